//! A purchase from the cart to what the user is told, over both doors.

use devstack::clients::{Door, period_around_now};
use proto::{
    cart::{AddToCartRequest, CartGoodInfo, ListCartRequest, PurchaseRequest},
    loms::{ListOrderRequest, OrderPayedRequest, StocksRequest},
    notifications::GetHistoryWithPeriodRequest,
};
use serde_json::json;

use crate::test_stack::{TestStack, eventually};

const HEART: u32 = 85_123_001;
const USER: i64 = 11;

#[tokio::test]
async fn what_is_bought_is_paid_for_and_told() {
    let stack = TestStack::start(&[(1, HEART, 3), (2, HEART, 5)]).await;
    let mut clients = stack.clients.clone();
    clients
        .cart
        .add_to_cart(AddToCartRequest {
            user: USER,
            sku: HEART,
            count: 4,
        })
        .await
        .unwrap();
    let cart = clients
        .cart
        .list_cart(ListCartRequest { user: USER })
        .await
        .unwrap()
        .into_inner();
    let name = "White Hanging Heart T-Light Holder".to_owned();
    assert_eq!(
        cart.items,
        [CartGoodInfo {
            sku: HEART,
            count: 4,
            name,
            price: 255
        }]
    );
    assert_eq!(cart.total_price, 1020);

    let request = PurchaseRequest {
        user: USER,
        ..Default::default()
    };
    let order_id = clients
        .cart
        .purchase(request)
        .await
        .unwrap()
        .into_inner()
        .order_id;
    let on_sale = clients
        .loms
        .stocks(StocksRequest { sku: HEART })
        .await
        .unwrap()
        .into_inner()
        .stocks;
    assert_eq!(on_sale.iter().map(|stock| stock.count).sum::<u64>(), 4);
    clients
        .loms
        .order_payed(OrderPayedRequest { order_id })
        .await
        .unwrap();
    let order = clients
        .loms
        .list_order(ListOrderRequest { order_id })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((order.status.as_str(), order.user), ("payed", USER));

    let (from, to) = period_around_now();
    let request = GetHistoryWithPeriodRequest {
        user: USER,
        from: Some(from),
        to: Some(to),
        ..Default::default()
    };
    let told = async || {
        let mut notifications = stack.clients.notifications.clone();
        let history = notifications
            .get_history_with_period(request.clone())
            .await
            .unwrap()
            .into_inner();
        history
            .messages
            .into_iter()
            .map(|message| (message.order_id, message.user_id, message.status))
            .collect::<Vec<_>>()
    };
    let expected: Vec<_> = ["new", "awaiting payment", "payed"]
        .map(|status| (order_id, USER, status.to_owned()))
        .into();
    eventually("three messages", async || told().await.len() == 3).await;
    let told: Vec<(i64, i64, String)> = told().await;
    assert_eq!(told, expected);

    let body = json!({"user": USER.to_string(), "from": from, "to": to});
    let answer = stack
        .clients
        .http
        .post(Door::Notifications, "/history", &body)
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    let messages = answer.body["messages"].as_array().unwrap();
    let told: Vec<_> = messages
        .iter()
        .map(|message| message["status"].as_str().unwrap())
        .collect();
    assert_eq!(told, ["new", "awaiting payment", "payed"]);
    stack.finish().await;
}

#[tokio::test]
async fn a_purchase_over_http_answers_as_the_gateway_did() {
    let stack = TestStack::start(&[(1, HEART, 10)]).await;
    let http = &stack.clients.http;
    // old clients send whole floats, both spellings, and fields that nobody knows
    let body =
        json!({"user": "12", "sku": 85_123_001.0, "count": 2, "colour": "red", "note": null});
    let answer = http
        .post(Door::Checkout, "/addToCart", &body)
        .await
        .unwrap();
    assert_eq!((answer.status, &answer.body), (200, &json!({})));
    let user = json!({"user": 12});
    let item = json!({"sku": HEART, "count": 2, "name": "White Hanging Heart T-Light Holder", "price": 255});
    for path in ["/listCart", "/listCartRequest"] {
        let answer = http.post(Door::Checkout, path, &user).await.unwrap();
        assert_eq!(
            answer.body,
            json!({"items": [item], "totalPrice": 510}),
            "{path}"
        );
        let trace = answer.headers["x-trace-id"].to_str().unwrap();
        assert_eq!(answer.headers["grpc-metadata-x-trace-id"], trace);
        assert_eq!(
            answer.headers["grpc-metadata-content-type"],
            "application/grpc"
        );
    }
    let bought = http.post(Door::Checkout, "/purchase", &user).await.unwrap();
    let order = bought.body["orderID"]
        .as_str()
        .expect("64-bit numbers are strings");
    let listed = http
        .post(Door::Loms, "/listOrder", &json!({"orderID": order}))
        .await
        .unwrap();
    assert_eq!(listed.body["status"], "awaiting payment");
    assert_eq!(listed.body["items"], json!([{"sku": HEART, "count": 2}]));
    let answer = http
        .post(
            Door::Loms,
            "/orderPayed",
            &json!({"order_i_d": order, "orderID": order}),
        )
        .await
        .unwrap();
    assert_eq!((answer.status, answer.body), (200, json!({})));
    let stocks = http
        .post(Door::Loms, "/stocks", &json!({"sku": HEART}))
        .await
        .unwrap();
    assert_eq!(
        stocks.body,
        json!({"stocks": [{"warehouseID": "1", "count": "8"}]})
    );
    let empty = http.post(Door::Checkout, "/listCart", &user).await.unwrap();
    assert_eq!(
        empty.body,
        json!({"items": [], "totalPrice": 0}),
        "defaults are present"
    );
    stack.finish().await;
}
