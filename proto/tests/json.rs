//! Pins the JSON that HTTP clients send and get: proto3 JSON as grpc-gateway v2 speaks it. What only the HTTP door does
//! (nulls dropped, whole floats read as integers) is tested where it is done, in `platform`.

use proto::{cart, loms, notifications};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn written<M: Serialize>(message: &M) -> Value {
    serde_json::to_value(message).unwrap()
}

fn read<M: DeserializeOwned>(body: Value) -> M {
    serde_json::from_value(body).unwrap()
}

fn at(seconds: i64, nanos: i32) -> Option<pbjson_types::Timestamp> {
    Some(pbjson_types::Timestamp { seconds, nanos })
}

#[test]
fn default_values_are_present_and_an_unset_message_is_null() {
    assert_eq!(
        written(&cart::ListCartResponse::default()),
        json!({ "items": [], "totalPrice": 0 })
    );
    assert_eq!(
        written(&cart::PurchaseResponse::default()),
        json!({ "orderID": "0" })
    );
    assert_eq!(
        written(&loms::StocksResponse::default()),
        json!({ "stocks": [] })
    );
    assert_eq!(
        written(&loms::ListOrderResponse::default()),
        json!({ "status": "", "user": "0", "items": [], "paymentDeadline": null, "history": [], "createdAt": null }),
    );
    assert_eq!(
        written(&notifications::GetHistoryWithPeriodResponse::default()),
        json!({ "messages": [], "nextPageToken": "" }),
    );
    assert_eq!(
        written(&loms::ReceiveStockResponse::default()),
        json!({ "alreadyReceived": false })
    );
    assert_eq!(written(&pbjson_types::Empty {}), json!({}));
}

#[test]
fn sixty_four_bit_integers_are_strings_and_shorter_ones_are_numbers() {
    let stocks = loms::StocksResponse {
        stocks: vec![loms::Stock {
            warehouse_id: i64::MAX,
            count: u64::MAX,
        }],
    };
    assert_eq!(
        written(&stocks),
        json!({ "stocks": [{ "warehouseID": "9223372036854775807", "count": "18446744073709551615" }] }),
    );
    let line = cart::CartGoodInfo {
        sku: u32::MAX,
        count: 2,
        name: "\"mug\" \u{1F375}".into(),
        price: 199,
    };
    assert_eq!(
        written(&cart::ListCartResponse {
            items: vec![line],
            total_price: 398
        }),
        json!({
            "items": [{ "sku": 4_294_967_295_u32, "count": 2, "name": "\"mug\" \u{1F375}", "price": 199 }],
            "totalPrice": 398,
        }),
    );
}

#[test]
fn an_order_is_written_with_its_history_and_times_in_utc() {
    let order = loms::ListOrderResponse {
        status: "awaiting payment".into(),
        user: 7,
        items: vec![loms::OrderItem {
            sku: 1002,
            count: 3,
        }],
        payment_deadline: at(1_291_198_200, 0),
        history: vec![loms::StatusChange {
            sequence: 1,
            status: "new".into(),
            actor: "user".into(),
            at: at(1_291_197_600, 250_000_000),
            from_status: String::new(),
        }],
        created_at: at(1_291_197_600, 250_000_000),
    };
    let body = json!({
        "status": "awaiting payment",
        "user": "7",
        "items": [{ "sku": 1002, "count": 3 }],
        "paymentDeadline": "2010-12-01T10:10:00Z",
        "history": [{ "sequence": 1, "status": "new", "actor": "user", "at": "2010-12-01T10:00:00.250Z", "fromStatus": "" }],
        "createdAt": "2010-12-01T10:00:00.250Z",
    });
    assert_eq!(written(&order), body);
    assert_eq!(read::<loms::ListOrderResponse>(body), order);
}

#[test]
fn a_time_has_as_many_digits_as_it_needs_and_a_time_that_does_not_exist_is_an_error() {
    let change = |at| loms::StatusChange {
        at,
        ..Default::default()
    };
    assert_eq!(written(&change(at(0, 0)))["at"], "1970-01-01T00:00:00Z");
    assert_eq!(
        written(&change(at(-1, 123_456_789)))["at"],
        "1969-12-31T23:59:59.123456789Z"
    );
    assert!(serde_json::to_value(change(at(i64::MAX, 0))).is_err());
}

#[test]
fn a_message_of_the_history_keeps_its_lower_camel_names() {
    let message = notifications::Message {
        order_id: 12,
        user_id: 7,
        status: "payed".into(),
        message: "paid".into(),
        created_at: None,
    };
    assert_eq!(
        written(&message),
        json!({ "orderId": "12", "userId": "7", "status": "payed", "message": "paid", "createdAt": null }),
    );
}

#[test]
fn a_request_may_spell_a_field_either_way() {
    let expected = cart::PurchaseRequest {
        user: 7,
        idempotency_key: "k-1".into(),
    };
    assert_eq!(
        read::<cart::PurchaseRequest>(json!({ "user": "7", "idempotencyKey": "k-1" })),
        expected
    );
    assert_eq!(
        read::<cart::PurchaseRequest>(json!({ "user": "7", "idempotency_key": "k-1" })),
        expected
    );
    let expected = notifications::GetHistoryWithPeriodRequest {
        page_size: 5,
        ..Default::default()
    };
    assert_eq!(
        read::<notifications::GetHistoryWithPeriodRequest>(json!({ "pageSize": 5 })),
        expected
    );
    assert_eq!(
        read::<notifications::GetHistoryWithPeriodRequest>(json!({ "page_size": 5 })),
        expected
    );
    // the contract's own camel names have one spelling
    assert_eq!(
        read::<loms::ListOrderRequest>(json!({ "orderID": "9" })).order_id,
        9
    );
}

#[test]
fn an_integer_is_read_from_a_number_and_from_a_string() {
    for user in [json!(7), json!("7")] {
        assert_eq!(
            read::<cart::ListCartRequest>(json!({ "user": user })).user,
            7
        );
    }
    for sku in [json!(4_294_967_295_u32), json!("4294967295")] {
        assert_eq!(
            read::<loms::StocksRequest>(json!({ "sku": sku })).sku,
            u32::MAX
        );
    }
    assert_eq!(
        read::<cart::ListCartRequest>(json!({ "user": "-9223372036854775808" })).user,
        i64::MIN
    );
}

#[test]
fn what_a_request_leaves_out_is_the_default_and_what_it_adds_is_ignored() {
    assert_eq!(
        read::<loms::CreateOrderRequest>(json!({})),
        loms::CreateOrderRequest::default()
    );
    let body = json!({ "user": 1, "items": [{ "sku": 2, "count": 3, "colour": "red" }], "coupon": { "code": "X" } });
    let request = read::<loms::CreateOrderRequest>(body);
    assert_eq!(request.items, [loms::OrderItem { sku: 2, count: 3 }]);
}

#[test]
fn a_wrong_type_or_a_number_out_of_range_is_refused() {
    let refused = [
        json!({ "user": "seven" }),
        json!({ "user": [7] }),
        json!({ "user": 7, "sku": -1 }),
        json!({ "user": 7, "sku": 4_294_967_296_u64 }),
        json!({ "user": 7, "sku": 1.5 }),
        json!({ "user": "9223372036854775808" }),
        json!([]),
        json!("text"),
    ];
    for body in refused {
        let result = serde_json::from_value::<cart::AddToCartRequest>(body.clone());
        assert!(result.is_err(), "{body} was read as {result:?}");
    }
}
