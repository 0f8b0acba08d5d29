//! What one caller may take up: bytes of a message, of a body, of headers, and lines of an order.

use devstack::{
    clients::http_client,
    stack::{Options, Stack},
};
use proto::loms::{CreateOrderRequest, OrderItem, StocksRequest, loms_client::LomsClient};
use serde_json::{Value, json};
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{replica::Replica, test_stack::binaries};

const LINES: usize = 50;
const BODY: usize = 20_000;

async fn loms() -> (Stack, Replica) {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    // plaintext: what is refused below HTTP/2 is said in bytes
    let settings = json!({
        "tls": {"enabled": false, "client_auth": "none"},
        "limits": {"body_bytes": BODY, "header_bytes": 9_000, "idle_timeout": "1s", "request_timeout": "2s"},
        "orders": {"max_lines": LINES},
    });
    let replica = Replica::start(&stack, &settings).await;
    (stack, replica)
}

async fn client(replica: &Replica) -> LomsClient<Channel> {
    let channel = Channel::from_shared(format!("http://{}", replica.grpc)).unwrap();
    LomsClient::new(channel.connect().await.unwrap())
}

fn order(lines: usize) -> CreateOrderRequest {
    let item = OrderItem { sku: 7, count: 1 };
    CreateOrderRequest {
        user: 1,
        items: vec![item; lines],
        ..Default::default()
    }
}

async fn post(replica: &Replica, path: &str, body: String) -> (u16, Value) {
    let url = format!("http://{}{path}", replica.http);
    let answer = http_client().unwrap().post(url).body(body).send().await;
    let answer = answer.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

#[tokio::test]
async fn more_than_the_limits_is_refused_and_the_next_call_is_not() {
    let (stack, replica) = loms().await;
    let mut loms = client(&replica).await;

    // stock there is none, so that an order is made and fails
    let made = loms.create_order(order(LINES)).await.unwrap().into_inner();
    assert_eq!(
        made.shortages[0].requested, LINES as u64,
        "lines are summed"
    );
    let refused = loms.create_order(order(LINES + 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let fields = refused.get_details_bad_request().unwrap().field_violations;
    let named: Vec<_> = fields
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(named, ["items"], "{refused:?}");
    let items = vec![json!({"sku": 7, "count": 1}); LINES + 1];
    let body = json!({"user": 1, "items": items}).to_string();
    let (status, answer) = post(&replica, "/createOrder", body).await;
    assert_eq!((status, &answer["code"]), (400, &json!(3)), "{answer}");

    let refused = loms.create_order(order(BODY / 2)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let (status, answer) = post(&replica, "/stocks", " ".repeat(BODY + 1)).await;
    assert_eq!((status, &answer["code"]), (413, &json!(8)), "{answer}");

    let mut long = Request::new(StocksRequest { sku: 7 });
    let value = MetadataValue::try_from("x".repeat(10_000)).unwrap();
    long.metadata_mut().insert("x-long", value);
    let refused = loms.stocks(long).await.unwrap_err();
    println!("gRPC, 10,000 bytes of headers: {refused:?}");
    let url = format!("http://{}/stocks", replica.http);
    let long = http_client()
        .unwrap()
        .post(&url)
        .header("x-long", "x".repeat(60_000));
    let answer = long.body("{\"sku\":7}").send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 431);
    let fine = http_client()
        .unwrap()
        .post(&url)
        .header("x-long", "x".repeat(8_000));
    let answer = fine.body("{\"sku\":7}").send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);

    loms.stocks(StocksRequest { sku: 7 }).await.unwrap();
    assert_eq!(
        post(&replica, "/stocks", "{\"sku\":7}".to_owned()).await.0,
        200
    );
    replica.stop().await;
    stack.stop().await.unwrap();
}
