//! Pins the JSON that HTTP clients get: proto3 JSON as grpc-gateway v2 writes it. How requests are
//! read is tested where it is done, in `platform`.

use proto::{cart, loms, notifications};
use serde::Serialize;
use serde_json::{Value, json};

fn written<M: Serialize>(message: &M) -> Value {
    serde_json::to_value(message).unwrap()
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
