//! What one caller may take up: bytes of a message, of a body, of headers, lines of an order, and time without a word.

use std::time::{Duration, Instant};

use devstack::{
    clients::http_client,
    stack::{Options, Stack},
};
use proto::loms::{CreateOrderRequest, OrderItem, StocksRequest, loms_client::LomsClient};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{replica::Replica, test_stack::binaries};

const LINES: usize = 50;
const BODY: usize = 20_000;
const IDLE: Duration = Duration::from_secs(1);
const REQUEST: Duration = Duration::from_secs(2);

async fn loms() -> (Stack, Replica) {
    let limits = json!({"body_bytes": BODY, "header_bytes": 9_000, "idle_timeout": "1s", "request_timeout": "2s"});
    loms_within(limits).await
}

async fn loms_within(limits: Value) -> (Stack, Replica) {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    // plaintext: what is refused below HTTP/2 is said in bytes
    let settings = json!({
        "tls": {"enabled": false, "client_auth": "none"},
        "limits": limits,
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
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let (status, answer) = post(&replica, "/stocks", " ".repeat(BODY + 1)).await;
    assert_eq!((status, &answer["code"]), (413, &json!(8)), "{answer}");

    let with_header = |bytes: usize| {
        let mut request = Request::new(StocksRequest { sku: 7 });
        let value = MetadataValue::try_from("x".repeat(bytes)).unwrap();
        request.metadata_mut().insert("x-long", value);
        request
    };
    loms.stocks(with_header(8_000)).await.unwrap();
    let refused = loms.stocks(with_header(10_000)).await.unwrap_err();
    // HTTP/2's own 431 and a reset of the stream; a client makes of it what it sees first. The service knows nothing of it
    let codes = [Code::Unknown, Code::Internal];
    assert!(codes.contains(&refused.code()), "{refused:?}");
    assert!(
        refused.metadata().get("x-trace-id").is_none(),
        "{refused:?}"
    );
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

/// Sends `said`, then nothing; what comes back until the connection is closed, and when that was.
async fn silent_after(
    what: &str,
    address: std::net::SocketAddr,
    said: &[u8],
) -> (String, Duration) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(said).await.unwrap();
    let (began, mut heard) = (Instant::now(), Vec::new());
    let closed = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut heard));
    let closed = closed.await;
    assert!(closed.is_ok(), "{what}: not closed after {heard:?}");
    (
        String::from_utf8_lossy(&heard).into_owned(),
        began.elapsed(),
    )
}

#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let (stack, replica) = loms().await;
    let whole = b"POST /stocks HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{\"sku\":7}";
    let slow_body = b"POST /stocks HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{";
    let slow_head = b"POST /stocks HTTP/1.1\r\nhost";
    // preface and empty settings; then not even an answer to a ping
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let (answered, body, head, nothing, door, other_door) = tokio::join!(
        silent_after("answered", replica.http, whole),
        silent_after("body", replica.http, slow_body),
        silent_after("head", replica.http, slow_head),
        silent_after("nothing", replica.http, b""),
        silent_after("door", replica.http, http2),
        silent_after("other door", replica.grpc, http2),
    );
    for (what, (_, took)) in [
        ("answered", &answered),
        ("head", &head),
        ("nothing", &nothing),
    ] {
        println!("{what}: closed after {took:?}");
        assert!(
            *took >= IDLE - Duration::from_millis(50),
            "{what}: {took:?}"
        );
        assert!(*took < IDLE + Duration::from_secs(3), "{what}: {took:?}");
    }
    assert!(answered.0.starts_with("HTTP/1.1 200"), "{}", answered.0);
    let (text, took) = &body;
    println!("body: {took:?} {text}");
    assert!(text.starts_with("HTTP/1.1 504"), "{text}");
    assert!(
        text.to_ascii_lowercase().contains("connection: close"),
        "{text}"
    );
    assert!(text.contains("\"code\":4"), "{text}");
    assert!(*took >= REQUEST - Duration::from_millis(50), "{took:?}");
    assert!(*took < REQUEST + Duration::from_secs(3), "{took:?}");
    // JSON is spoken over HTTP/1
    assert!(door.1 < IDLE, "{door:?}");
    // asked after a second, given ten for the answer
    assert!(
        other_door.1 >= IDLE + Duration::from_secs(9),
        "{other_door:?}"
    );
    // one that answers pings stays
    let mut loms = client(&replica).await;
    loms.stocks(StocksRequest { sku: 7 }).await.unwrap();
    replica.stop().await;
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn who_begins_no_handshake_is_not_waited_for() {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    let replica = Replica::start(&stack, &json!({"limits": {"idle_timeout": "1s"}})).await;
    // the head of a ClientHello of 512 bytes, of which none comes
    let (nothing, begun) = tokio::join!(
        silent_after("nothing", replica.grpc, b""),
        silent_after("begun", replica.grpc, b"\x16\x03\x01\x02\x00"),
    );
    for (said, took) in [nothing, begun] {
        assert!(said.is_empty(), "{said}");
        assert!(took >= IDLE - Duration::from_millis(50), "{took:?}");
        assert!(took < IDLE + Duration::from_secs(3), "{took:?}");
    }
    let mut loms = replica.stranger();
    loms.stocks(StocksRequest { sku: 7 }).await.unwrap();
    replica.stop().await;
    stack.stop().await.unwrap();
}

/// Half a request of 1,000 bytes, which is being read; its other half is [`rest`].
async fn half_sent(replica: &Replica) -> TcpStream {
    let mut stream = TcpStream::connect(replica.http).await.unwrap();
    let head = "POST /stocks HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\nconnection: close\r\n\
                content-length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    // said when the body is asked for
    let mut go_on = *b"HTTP/1.1 100 Continue\r\n\r\n";
    let wanted = go_on;
    stream.read_exact(&mut go_on).await.unwrap();
    assert_eq!(go_on, wanted);
    stream.write_all(b"{").await.unwrap();
    stream
}

fn rest() -> String {
    format!("{:<999}", "\"sku\":7}")
}

#[tokio::test]
async fn a_body_that_arrives_takes_its_room_and_no_place() {
    let limits = json!({"in_flight": 1, "memory": 2_330, "request_timeout": "30s"});
    let (stack, replica) = loms_within(limits).await;
    let (mut one, other) = (half_sent(&replica).await, half_sent(&replica).await);
    let ask = async || post(&replica, "/stocks", format!("{:<50}", "{\"sku\":7}")).await;
    let began = Instant::now();
    let (status, answer) = ask().await;
    assert_eq!((status, &answer["code"]), (429, &json!(8)), "{answer}");
    assert_eq!(answer["details"][0]["reason"], "BYTES", "{answer}");
    // a body that nobody waits for
    let large = " ".repeat(100_000);
    let url = format!("http://{}/stocks", replica.http);
    let upload = http_client().unwrap().post(&url).body(large).send().await;
    if let Ok(refused) = upload {
        assert_eq!(refused.status().as_u16(), 429);
    }
    let mut loms = client(&replica).await;
    let refused = loms.create_order(order(10)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "both ports");
    let asked = loms.stocks(StocksRequest { sku: 7 }).await;
    asked.expect("a place is free, and room for a few bytes");
    assert!(began.elapsed() < Duration::from_secs(5), "at once");
    let url = format!("http://{}/metrics", replica.http);
    let metrics = http_client().unwrap().get(&url).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let counted = metrics.lines().any(|line| {
        line.starts_with("loms_histogram_response_time_seconds_count{")
            && line.contains("method=\"/loms.Loms/CreateOrder\"")
            && line.contains("status=\"ResourceExhausted\"")
    });
    assert!(counted, "{metrics}");

    one.write_all(rest().as_bytes()).await.unwrap();
    let mut heard = String::new();
    one.read_to_string(&mut heard).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 200"), "{heard}");
    assert_eq!(ask().await.0, 200, "its room is free again");
    drop(other);
    replica.stop().await;
    stack.stop().await.unwrap();
}
