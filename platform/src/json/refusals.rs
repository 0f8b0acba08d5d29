//! Bodies that are refused, and what their senders hear.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proto::{
    cart::PurchaseRequest,
    loms::{CreateOrderRequest, ListOrderRequest, ReceiveStockRequest, StocksRequest},
    notifications::GetHistoryWithPeriodRequest,
};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::tests::read;
use crate::error::{Code, Detail, Fault};

const INT64: &str = "must be an integer, -9223372036854775808 to 9223372036854775807";
const INT32: &str = "must be an integer, -2147483648 to 2147483647";
const UINT32: &str = "must be an integer, 0 to 4294967295";

/// Every field that is named, and what is said of it.
fn violations(fault: Fault) -> Vec<(String, String)> {
    assert_eq!(fault.code, Code::InvalidArgument, "{fault:?}");
    let Detail::Fields { violations, .. } = fault.detail else {
        panic!("{fault:?} names no field");
    };
    let pairs = violations.into_iter().map(|v| (v.field, v.description));
    pairs.collect()
}

#[track_caller]
fn refused(body: &str, expected: &[(&str, &str)]) {
    let fault = read::<CreateOrderRequest>(body).expect_err(body);
    let found = violations(fault);
    let found: Vec<_> = found
        .iter()
        .map(|(f, d)| (f.as_str(), d.as_str()))
        .collect();
    assert_eq!(found, expected, "{body}");
}

#[test]
fn a_wrong_integer_is_named_with_its_place() {
    let wrong = [
        "1.5",
        "1e-1",
        "-1",
        "-1e2",
        "4294967296",
        "4294967296.0",
        "1e10",
        "1e40",
        "1e300",
        "1e999999999999",
        "true",
        "false",
        "[2]",
        "[]",
        "{}",
        r#"{"a":1}"#,
        r#""""#,
        r#""2 ""#,
        r#"" 2""#,
        r#""-1""#,
        r#""1.5""#,
        r#""4294967296""#,
        r#""seven""#,
        r#""0x7""#,
        r#""NaN""#,
        r#""1_0""#,
        r#""+""#,
        r#""++1""#,
        r#""\u00b2""#,
        r#""true""#,
        r#""null""#,
    ];
    for wrong in wrong {
        let body = format!(r#"{{"items":[{{"sku":1,"count":{wrong}}}]}}"#);
        refused(&body, &[("items[0].count", UINT32)]);
    }
    for wrong in [
        "9223372036854775808",
        r#""9223372036854775808""#,
        "-9223372036854775809",
        "1e19",
        "0.5",
        "true",
    ] {
        refused(&format!(r#"{{"user":{wrong}}}"#), &[("user", INT64)]);
    }
    let fault =
        read::<GetHistoryWithPeriodRequest>(r#"{"to":{"month":2147483648},"pageSize":[1]}"#);
    let named = [("to.month", INT32), ("page_size", INT32)].map(|(f, d)| (f.into(), d.into()));
    assert_eq!(violations(fault.unwrap_err()), named);
    let fault = read::<ReceiveStockRequest>(r#"{"lines":[{"count":18446744073709551616}]}"#);
    let named = (
        "lines[0].count".into(),
        "must be an integer, 0 to 18446744073709551615".into(),
    );
    assert_eq!(violations(fault.unwrap_err()), [named]);
}

#[test]
fn what_protojson_reads_beyond_the_corpus_is_read() {
    let users = [
        ("1e16", 10_000_000_000_000_000),
        (r#""1e2""#, 100),
        (r#""1.0""#, 1),
        (r#""-1.50e1""#, -15),
        ("9007199254740993.0", 9_007_199_254_740_993),
        ("9223372036854775807.0", i64::MAX),
        ("-9.223372036854775808e18", i64::MIN),
        (r#""-0""#, 0),
        ("-0e5", 0),
    ];
    for (text, user) in users {
        let read = read::<PurchaseRequest>(format!(r#"{{"user":{text}}}"#));
        assert_eq!(read.unwrap().user, user, "{text}");
    }
    for text in [r#""-0""#, "-0.0", r#""0e9""#] {
        let read = read::<StocksRequest>(format!(r#"{{"sku":{text}}}"#));
        assert_eq!(read.unwrap().sku, 0, "{text}");
    }
    // a number that no float holds, in a field that nobody reads
    assert!(read::<StocksRequest>(r#"{"x":1e400}"#).is_ok());
}

#[test]
fn another_type_is_named_with_what_was_expected() {
    let object = "must be an object";
    for wrong in [
        "1", "-1", "1.5", "true", r#""x""#, r#""\n""#, "[]", "[{}]", "[1,[2]]", "null",
    ] {
        refused(
            &format!(r#"{{"items":[{wrong}]}}"#),
            &[("items[0]", object)],
        );
    }
    for wrong in [
        "1",
        "-1",
        "1.5",
        "true",
        r#""x""#,
        r#""\n""#,
        "{}",
        r#"{"sku":1}"#,
    ] {
        refused(
            &format!(r#"{{"items":{wrong}}}"#),
            &[("items", "must be an array")],
        );
    }
    for wrong in ["1", "1e400", "true", "[]", r#"["x"]"#, "{}"] {
        let body = format!(r#"{{"idempotencyKey":{wrong}}}"#);
        refused(&body, &[("idempotency_key", "must be a string")]);
    }
    let fault = read::<GetHistoryWithPeriodRequest>(r#"{"from":["2020"],"to":"2020-01-01"}"#);
    let named = ["from", "to"].map(|field| (field.to_owned(), object.to_owned()));
    assert_eq!(violations(fault.unwrap_err()), named);
}

#[test]
fn a_field_is_given_once_in_whatever_spelling() {
    let once = "must be given once";
    refused(r#"{"user":1,"user":1}"#, &[("user", once)]);
    refused(
        r#"{"user":1,"user":null,"user":2}"#,
        &[("user", once), ("user", once)],
    );
    refused(
        r#"{"idempotency_key":"a","idempotencyKey":"a"}"#,
        &[("idempotency_key", once)],
    );
    refused(
        r#"{"items":[{"sku":1},{"sku":1,"count":1,"sku":[]}],"items":[]}"#,
        &[("items[1].sku", once), ("items", once)],
    );
}

#[test]
fn another_fields_name_in_other_letters_is_not_ignored() {
    for wrong in ["orderId", "OrderID", "orderid", "ORDERID"] {
        let fault = read::<ListOrderRequest>(format!(r#"{{"{wrong}":"1"}}"#));
        let named = (wrong.to_owned(), "must be spelled orderID".to_owned());
        assert_eq!(violations(fault.unwrap_err()), [named]);
    }
    refused(
        r#"{"User":[[1]],"items":[{"SKU":{}}],"idempotencykey":"","IDEMPOTENCY_KEY":1}"#,
        &[
            ("User", "must be spelled user"),
            ("items[0].SKU", "must be spelled sku"),
            ("idempotencykey", "must be spelled idempotencyKey"),
            ("IDEMPOTENCY_KEY", "must be spelled idempotencyKey"),
        ],
    );
}

#[test]
fn all_wrong_fields_are_named_and_those_beyond_fifty_counted() {
    refused(
        r#"{"user":"one","items":[{"sku":-1},{},{"count":1.5}],"idempotencyKey":7}"#,
        &[
            ("user", INT64),
            ("items[0].sku", UINT32),
            ("items[2].count", UINT32),
            ("idempotency_key", "must be a string"),
        ],
    );
    let items = vec![r#"{"sku":"","count":""}"#; 1000].join(",");
    let fault = read::<CreateOrderRequest>(format!(r#"{{"items":[{items}]}}"#)).unwrap_err();
    assert_eq!(
        fault.message,
        format!("items[0].sku: {UINT32} (and 1999 more)")
    );
    let status = Status::from(fault);
    let listed = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(listed.len(), 51);
    assert_eq!(listed[49].field, "items[24].count");
    assert_eq!(listed[50].description, "and 1950 more");
}

#[test]
fn what_is_no_json_is_placed_without_serdes_insides() {
    let bodies = [
        (
            "{",
            "the body is not JSON: EOF while parsing an object (line 1, column 1)",
        ),
        (
            "{\"sku\":7,}",
            "the body is not JSON: trailing comma (line 1, column 10)",
        ),
        (
            "{\"sku\":7}}",
            "the body is not JSON: trailing characters (line 1, column 10)",
        ),
        (
            "\x0c \n {\"sku\"\n: x}",
            "the body is not JSON: expected value (line 3, column 3)",
        ),
        (
            "{\"sku\":07}",
            "the body is not JSON: invalid number (line 1, column 9)",
        ),
        (
            "{sku:7}",
            "the body is not JSON: key must be a string (line 1, column 2)",
        ),
        (
            "sku=7",
            "the body is not JSON: expected value (line 1, column 1)",
        ),
        (
            "\0",
            "the body is not JSON: expected value (line 1, column 1)",
        ),
        ("[]", "the body must be a JSON object"),
        ("7", "the body must be a JSON object"),
        ("null", "the body must be a JSON object"),
        ("\"sku\"", "the body must be a JSON object"),
        (
            r#"{"x":"\ud83c"}"#,
            "the body is not JSON: half a surrogate pair (line 1, column 7)",
        ),
        (
            r#"{"\udf75":1}"#,
            "the body is not JSON: half a surrogate pair (line 1, column 3)",
        ),
    ];
    for (body, message) in bodies {
        let fault = read::<StocksRequest>(body).unwrap_err();
        assert_eq!(
            (fault.code, &*fault.message),
            (Code::InvalidArgument, message),
            "{body}"
        );
        assert!(matches!(fault.detail, Detail::None), "{fault:?}");
    }
}

#[test]
fn what_is_no_text_is_refused_and_wrong_syntax_before_wrong_fields() {
    let fault = read::<StocksRequest>(b"{\"sku\":7,\"\xff\":1}").unwrap_err();
    assert_eq!(fault.message, "the body is not UTF-8 from byte 10 on");
    let fault = read::<StocksRequest>(r#"{"sku":"","x":"#).unwrap_err();
    assert!(
        fault.message.starts_with("the body is not JSON: "),
        "{fault:?}"
    );
}

#[test]
fn deep_nesting_is_refused_wherever_it_is_and_quickly() {
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let many = format!(r#"{{"x":[{}]}}"#, vec![deep(100); 20_000].join(","));
    let bodies = [
        format!(r#"{{"x":{}}}"#, deep(32)),
        format!(r#"{{"items":{}}}"#, deep(32)),
        format!(r#"{{"sku":{}}}"#, "[".repeat(100_000)),
        r#"{"to":"#.repeat(33),
        "[".repeat(100_000),
        many,
    ];
    for body in bodies {
        let began = Instant::now();
        let fault = read::<StocksRequest>(&body).unwrap_err();
        let start = &body[..body.len().min(80)];
        let said = "the body is nested deeper than 32 levels (line 1, column ";
        assert!(fault.message.starts_with(said), "{start}: {fault:?}");
        assert_eq!(fault.code, Code::InvalidArgument);
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "{start}: {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn a_list_is_read_as_far_as_it_may_be_long() {
    for entry in ["{}", "7", "{\"sku\":[]}"] {
        let items = vec![entry; 200_000].join(",");
        // what comes after the entry that is one too many is not looked at
        let body = format!(r#"{{"user":"one","items":[{items},}}}}"#);
        refused(&body, &[("items", "must have at most 10000 entries")]);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read::<CreateOrderRequest>(&body);
    }

    #[test]
    fn nothing_like_a_request_panics(
        parts in proptest::collection::vec(prop_oneof![
            prop::sample::select(vec![
                "{", "}", "[", "]", ",", ":", "\"", "\\", "\\u", "d83c", "null", "true", "1", "-", ".", "e", "9", "0",
                "\"user\":", "\"items\":[", "\"sku\":", "\"count\":", "\"idempotencyKey\":\"", "\"User\":", "é", " ", "\n",
            ]).prop_map(str::to_owned),
            ".{0,3}",
        ], 0..60),
    ) {
        let _ = read::<CreateOrderRequest>(format!("{{{}", parts.concat()));
    }

    #[test]
    fn every_integer_is_read_however_it_is_written(user: i64, zeros in 0_usize..4) {
        let zeros = "0".repeat(zeros);
        for text in [
            format!("{user}"),
            format!("\"{user}\""),
            format!("{user}.{zeros}0"),
            format!("{user}{zeros}e-{}", zeros.len()),
            format!("\"{user}.{zeros}0E+0\""),
        ] {
            let read = read::<PurchaseRequest>(format!(r#"{{"user":{text}}}"#));
            prop_assert_eq!(read.unwrap().user, user);
        }
    }
}
