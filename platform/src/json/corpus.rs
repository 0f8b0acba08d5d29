//! Bodies that clients have sent, or could have, and the messages that they have always been read
//! as.

use proto::{
    cart::PurchaseRequest,
    loms::{CreateOrderRequest, ListOrderRequest, OrderItem, StocksRequest},
    notifications::{Date, GetHistoryWithPeriodRequest},
};

use super::tests::read;

fn users(bodies: &[&str], user: i64) {
    for body in bodies {
        let read = read::<PurchaseRequest>(body);
        let user = PurchaseRequest {
            user,
            ..Default::default()
        };
        assert_eq!(read.unwrap(), user, "{body}");
    }
}

fn skus(bodies: &[&str], sku: u32) {
    for body in bodies {
        let read = read::<StocksRequest>(body);
        assert_eq!(read.unwrap(), StocksRequest { sku }, "{body}");
    }
}

#[test]
fn nothing_and_nulls_are_defaults() {
    let bodies = [
        "",
        " \n",
        "\x0c",
        "{}",
        "\r\n\t { } \n",
        "\x0c{}\x0c",
        r#"{"sku":null}"#,
        r#"{"sku":0}"#,
        r#"{"sku":"0"}"#,
        r#"{"sku":0.0}"#,
        r#"{"sku":0e5}"#,
        r#"{"sku":-0}"#,
        r#"{"sku":-0.0}"#,
    ];
    skus(&bodies, 0);
    let bodies = [
        r#"{"user":null}"#,
        r#"{"user":"-0"}"#,
        r#"{"idempotencyKey":null}"#,
    ];
    users(&bodies, 0);
    for body in [r#"{"items":null}"#, r#"{"items":[]}"#] {
        let read = read::<CreateOrderRequest>(body);
        assert_eq!(read.unwrap(), CreateOrderRequest::default(), "{body}");
    }
    let read = read::<GetHistoryWithPeriodRequest>(r#"{"from":null,"to":{},"pageSize":null}"#);
    let expected = GetHistoryWithPeriodRequest {
        to: Some(Date::default()),
        ..Default::default()
    };
    assert_eq!(read.unwrap(), expected);
}

#[test]
fn an_integer_is_a_number_or_a_string() {
    let bodies = [
        r#"{"sku":7}"#,
        r#"{"sku":"7"}"#,
        r#"{"sku":7.0}"#,
        r#"{"sku":7.000}"#,
        r#"{"sku":7e0}"#,
        r#"{"sku":7E+0}"#,
        r#"{"sku":0.7e1}"#,
        r#"{"sku":70e-1}"#,
        r#"{"sku":"+7"}"#,
        r#"{"sku":"007"}"#,
        r#"{"sku":"+007"}"#,
        r#"{"sku":"\u0037"}"#,
        r#"{"\u0073ku":7}"#,
        " {\n\t\"sku\" :\r 7 } ",
    ];
    skus(&bodies, 7);
    let bodies = [
        r#"{"sku":4294967295}"#,
        r#"{"sku":"4294967295"}"#,
        r#"{"sku":4294967295.0}"#,
        r#"{"sku":4.294967295e9}"#,
    ];
    skus(&bodies, u32::MAX);
    let bodies = [
        r#"{"user":9223372036854775807}"#,
        r#"{"user":"9223372036854775807"}"#,
        r#"{"user":"+9223372036854775807"}"#,
    ];
    users(&bodies, i64::MAX);
    let bodies = [
        r#"{"user":-9223372036854775808}"#,
        r#"{"user":"-9223372036854775808"}"#,
    ];
    users(&bodies, i64::MIN);
    users(
        &[
            r#"{"user":9007199254740993}"#,
            r#"{"user":"9007199254740993"}"#,
        ],
        9_007_199_254_740_993,
    );
    users(
        &[
            r#"{"user":9007199254740992.0}"#,
            r#"{"user":9.007199254740992e15}"#,
        ],
        9_007_199_254_740_992,
    );
    users(
        &[
            r#"{"user":-1e2}"#,
            r#"{"user":"-100"}"#,
            r#"{"user":"-00100"}"#,
        ],
        -100,
    );
}

#[test]
fn a_field_has_two_spellings() {
    for body in [
        r#"{"user":1,"idempotencyKey":"k \"\n\ud83c\udf75é"}"#,
        r#"{"idempotency_key":"k \"\n🍵\u00e9","user":"1"}"#,
    ] {
        let read = read::<PurchaseRequest>(body);
        let expected = PurchaseRequest {
            user: 1,
            idempotency_key: "k \"\n🍵é".into(),
        };
        assert_eq!(read.unwrap(), expected, "{body}");
    }
    let order = read::<ListOrderRequest>(r#"{"orderID":"9"}"#);
    assert_eq!(order.unwrap().order_id, 9);
    for body in [
        r#"{"pageSize":5,"page_token":"t"}"#,
        r#"{"page_size":"5","pageToken":"t"}"#,
    ] {
        let read = read::<GetHistoryWithPeriodRequest>(body).unwrap();
        assert_eq!((read.page_size, &*read.page_token), (5, "t"), "{body}");
    }
}

#[test]
fn what_is_unknown_is_ignored() {
    let bodies = [
        r#"{"sku":7,"colour":"red"}"#,
        r#"{"colour":{"deep":[[1.5,null,{"sku":8}],true]},"sku":7}"#,
        r#"{"":1,"sku":7,"SKUs":2,"sku ":3}"#,
        r#"{"x":1,"x":2,"sku":7}"#,
        r#"{"order_id":1,"sku":7,"x":1e300,"y":-1,"z":"\u0000"}"#,
        r#"{"x":null,"sku":7}"#,
    ];
    skus(&bodies, 7);
    users(&[r#"{"orderID":1,"items":[{}],"sku":"x"}"#], 0);
}

#[test]
fn messages_are_read_in_messages() {
    let body = r#"{"user":"3","items":[{"sku":7,"count":2},{"count":1e0,"count2":1,"sku":null},
        {"colour":[null]},{}],"idempotency_key":""}"#;
    let item = |sku, count| OrderItem { sku, count };
    let expected = CreateOrderRequest {
        user: 3,
        items: vec![item(7, 2), item(0, 1), item(0, 0), item(0, 0)],
        ..Default::default()
    };
    assert_eq!(read::<CreateOrderRequest>(body).unwrap(), expected);

    let body = r#"{"from":{"year":2020,"month":1.0,"day":"01"},"to":{"year":-5},"user":1}"#;
    let date = |year, month, day| Some(Date { year, month, day });
    let expected = GetHistoryWithPeriodRequest {
        user: 1,
        from: date(2020, 1, 1),
        to: date(-5, 0, 0),
        ..Default::default()
    };
    assert_eq!(read::<GetHistoryWithPeriodRequest>(body).unwrap(), expected);
}

#[test]
fn an_order_may_be_long_and_a_value_nested_thirty_two_deep() {
    let items = vec![r#"{"sku":1,"count":1}"#; 10_000].join(",");
    let order = read::<CreateOrderRequest>(&format!(r#"{{"items":[{items}]}}"#));
    assert_eq!(order.unwrap().items.len(), 10_000);
    let deep = format!(r#"{{"x":{}{},"sku":7}}"#, "[".repeat(31), "]".repeat(31));
    skus(&[&deep], 7);
}
