//! A whole purchase as Jaeger sees it: which span is part of which, which only follows from another, what they say, and what
//! they must not say.

use axum::{Router, routing::post};
use devstack::{
    clients::{Door, http_client, period_around_now},
    stack::{Options, Stack},
};
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    spans::{Agent, Span},
    test_stack::{TestStack, binaries, eventually},
};

const HEART: u32 = 85_123_001;
const USER: i64 = 4_711;
const BOT: &str = "7000001:the-bots-own-key";

/// A Bot API that is content with everything.
async fn telegram() -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let path = format!("/bot{BOT}/sendMessage");
    let router = Router::new().route(&path, post(async || "{\"ok\":true}"));
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, serving)
}

/// One call over HTTP; its trace and its answer.
async fn call(stack: &TestStack, door: Door, path: &str, body: Value) -> (String, Value) {
    let answer = stack.clients.http.post(door, path, &body).await.unwrap();
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    let trace = answer.headers["x-trace-id"].to_str().unwrap().to_owned();
    (trace, answer.body)
}

/// The span of `service` with this name that is part of `parent`.
async fn child(agent: &Agent, parent: &Span, service: &str, name: &str, kind: &str) -> Span {
    let what = format!("{service} {name} below {} {}", parent.service, parent.name);
    agent
        .find(&what, |span| {
            (span.trace.as_str(), span.parent) == (&parent.trace, parent.id)
                && (span.service.as_str(), span.name.as_str(), span.kind()) == (service, name, kind)
        })
        .await
}

/// The two spans that a call over HTTP begins with: the HTTP door's and the gRPC service's.
async fn doors(agent: &Agent, trace: &str, service: &str, http: &str, grpc: &str) -> Span {
    let what = format!("{http} of {trace}");
    let root = agent
        .find(&what, |span| span.trace == trace && span.name == http)
        .await;
    assert_eq!((root.parent, root.kind()), (0, "server"), "{root:?}");
    child(agent, &root, service, grpc, "server").await
}

#[tokio::test]
async fn a_purchase_is_one_trace_from_the_http_door_to_telegram() {
    let agent = Agent::start().await;
    let (api_url, _telegram) = telegram().await;
    let jaeger = agent.section();
    let settings = json!({
        "checkout": {"jaeger": jaeger},
        "loms": {"jaeger": jaeger},
        "notifications": {"jaeger": jaeger,
                          "telegram": {"api_key": BOT, "chat_id": "-100200", "api_url": api_url}},
    });
    let mut stack = TestStack::start_with(settings, &[(1, HEART, 9)]).await;
    let topic = stack.stack().broker().names().0.to_owned();
    let item = json!({"user": USER, "sku": HEART, "count": 2});

    let (trace, _) = call(&stack, Door::Checkout, "/addToCart", item).await;
    let added = doors(
        &agent,
        &trace,
        "checkout",
        "POST /addToCart",
        "/cart.Cart/AddToCart",
    )
    .await;
    assert_eq!(added.tag("user.id"), Some("4711"));
    let asked = child(&agent, &added, "checkout", "/loms.Loms/Stocks", "client").await;
    child(&agent, &asked, "loms", "/loms.Loms/Stocks", "server").await;

    let user = json!({"user": USER});
    let (trace, _) = call(&stack, Door::Checkout, "/listCart", user.clone()).await;
    let listed = doors(
        &agent,
        &trace,
        "checkout",
        "POST /listCart",
        "/cart.Cart/ListCart",
    )
    .await;
    let get_product = "/route256.product.ProductService/GetProduct";
    child(&agent, &listed, "checkout", get_product, "client").await;

    let (trace, bought) = call(&stack, Door::Checkout, "/purchase", user).await;
    let order = bought["orderID"].as_str().unwrap().to_owned();
    let purchase = doors(
        &agent,
        &trace,
        "checkout",
        "POST /purchase",
        "/cart.Cart/Purchase",
    )
    .await;
    let create = "/loms.Loms/CreateOrder";
    let client = child(&agent, &purchase, "checkout", create, "client").await;
    let server = child(&agent, &client, "loms", create, "server").await;
    let placement = child(&agent, &server, "loms", "placement", "").await;
    for span in [&purchase, &server, &placement] {
        assert_eq!(span.tag("order.id"), Some(order.as_str()), "{span:?}");
        assert_eq!(span.tag("user.id"), Some("4711"), "{span:?}");
    }
    agent
        .find("the batch that placed it", |span| {
            span.name == "placement.batch" && span.follows.contains(&server.place())
        })
        .await;
    told(&agent, &server, &topic, &order, &["1", "2"]).await;

    let body = json!({"orderID": order});
    let (trace, _) = call(&stack, Door::Loms, "/orderPayed", body).await;
    let paid = doors(
        &agent,
        &trace,
        "loms",
        "POST /orderPayed",
        "/loms.Loms/OrderPayed",
    )
    .await;
    assert_eq!(paid.tag("order.id"), Some(order.as_str()));
    told(&agent, &paid, &topic, &order, &["3"]).await;

    let (from, to) = period_around_now();
    let body = json!({"user": USER, "from": from, "to": to});
    let (trace, _) = call(&stack, Door::Notifications, "/history", body).await;
    let rpc = "/notifications.Notifications/GetHistoryWithPeriod";
    let history = doors(&agent, &trace, "notifications", "POST /history", rpc).await;
    assert_eq!(history.tag("user.id"), Some("4711"));

    no_secret_left(&agent, stack.stack());
    no_noise(&agent);
    stack.finish().await;
}

/// Of the call behind `cause`, each event: sent as part of its trace, consumed by a span that follows from the sending, told
/// as part of the trace again.
async fn told(agent: &Agent, cause: &Span, topic: &str, order: &str, sequences: &[&str]) {
    for sequence in sequences {
        let what = format!("event {sequence} sent below {}", cause.name);
        let sent = agent
            .find(&what, |span| {
                (span.trace.as_str(), span.parent) == (&cause.trace, cause.id)
                    && span.tag("event.sequence") == Some(sequence)
            })
            .await;
        assert_eq!((sent.service.as_str(), sent.kind()), ("loms", "producer"));
        assert_eq!(sent.name, format!("{topic} send"));
        assert_eq!(sent.tag("order.id"), Some(order));
        let consumed = agent
            .find("its consumer", |span| {
                span.service == "notifications" && span.follows.contains(&sent.place())
            })
            .await;
        assert_eq!(consumed.kind(), "consumer");
        assert_ne!(consumed.trace, sent.trace, "a link, not a part");
        let tell = child(agent, &sent, "notifications", "delivery.tell", "").await;
        assert_eq!(tell.tag("order.id"), Some(order));
        let message = "telegram.sendMessage";
        let message = child(agent, &tell, "notifications", message, "client").await;
        assert_eq!(message.tag("http.status"), Some("200"));
    }
}

/// Nothing in any datagram that only its owner should know.
fn no_secret_left(agent: &Agent, stack: &Stack) {
    let mut secrets = vec![BOT.to_owned(), devstack::products::TOKEN.to_owned()];
    for service in ["checkout", "loms", "notifications"] {
        let url = stack.database(service).unwrap();
        let user = url.split("://").nth(1).unwrap().split('@').next().unwrap();
        secrets.push(user.split(':').nth(1).expect("a password").to_owned());
    }
    for packet in agent.packets() {
        let text = String::from_utf8_lossy(&packet);
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{secret} in {text}");
        }
    }
}

/// What machines ask every few seconds, and a relay or a placer with nothing to do, make no spans.
fn no_noise(agent: &Agent) {
    for span in agent.spans() {
        assert!(!span.name.starts_with("GET /"), "{span:?}");
        let batch = ["outbox.forward", "placement.batch", "inbox.settle"];
        if batch.contains(&span.name.as_str()) {
            assert_ne!(span.tag("batch.size"), Some("0"), "{span:?}");
        }
    }
}

/// A LOMS alone.
async fn loms(settings: Value) -> Stack {
    let options = Options {
        quiet: true,
        services: &["loms"],
        settings: json!({"loms": settings}),
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

/// `/stocks` with a `traceparent`, or without; the trace of the answer.
async fn stocks(stack: &Stack, traceparent: Option<&str>) -> String {
    let url = format!("http://{}/stocks", stack.service("loms").unwrap().http());
    let mut request = http_client().unwrap().post(url).body("{\"sku\":7}");
    if let Some(traceparent) = traceparent {
        request = request.header("traceparent", traceparent);
    }
    let answer = request.send().await.unwrap().error_for_status().unwrap();
    answer.headers()["x-trace-id"].to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_trace_that_begins_elsewhere_is_sent_if_its_caller_sends_it() {
    let agent = Agent::start().await;
    let mut silent = agent.section();
    silent["sample_ratio"] = json!(0.0);
    let silent = loms(json!({"jaeger": silent}));
    let (silent, open) = tokio::join!(silent, loms(json!({"jaeger": agent.section()})));

    let own = stocks(&silent, None).await;
    assert!(
        own.len() == 32 && own.chars().all(|digit| digit.is_ascii_hexdigit()),
        "{own}"
    );
    let wanted = "0af7651916cd43dd8448eb211c80319c";
    let sampled = format!("00-{wanted}-b7ad6b7169203331-01");
    assert_eq!(stocks(&silent, Some(&sampled)).await, wanted);
    let root = agent.find("the caller's trace", |span| {
        span.trace == wanted && span.name == "POST /stocks"
    });
    assert_eq!(root.await.parent, 0xb7ad_6b71_6920_3331);
    // of the calls to one service the spans arrive in their order
    assert!(
        agent.spans().iter().all(|span| span.trace == wanted),
        "{:?}",
        agent.spans()
    );

    let unwanted = "1af7651916cd43dd8448eb211c80319c";
    let unsampled = format!("00-{unwanted}-b7ad6b7169203331-00");
    assert_eq!(stocks(&open, Some(&unsampled)).await, unwanted);
    let own = stocks(&open, None).await;
    agent.find("the next trace", |span| span.trace == own).await;
    assert!(agent.spans().iter().all(|span| span.trace != unwanted));
    silent.stop().await.unwrap();
    open.stop().await.unwrap();
}

#[tokio::test]
async fn no_span_is_lost_and_none_is_larger_than_a_packet() {
    let agent = Agent::start().await;
    let stack = loms(json!({"jaeger": agent.section()})).await;
    let traces = join_all((0..300).map(|_| stocks(&stack, None))).await;
    // what has not left yet leaves with the end
    stack.stop().await.unwrap();
    agent
        .wait("two spans of each call", |spans| {
            let of = |trace: &String| spans.iter().filter(|span| &span.trace == trace).count();
            traces.iter().all(|trace| of(trace) == 2).then_some(())
        })
        .await;
    let packets = agent.packets();
    assert!(packets.len() > 1, "600 spans in one packet");
    assert!(packets.iter().all(|packet| packet.len() <= 9_000));
}

#[tokio::test]
async fn without_its_agent_a_service_starts_says_so_and_works() {
    // reserved for names that must not resolve (RFC 6761)
    let stack = loms(json!({"jaeger": {"host": "jaeger.invalid"}})).await;
    for _ in 0..3 {
        assert_eq!(stocks(&stack, None).await.len(), 32);
    }
    let log = stack.service("loms").unwrap().log().to_owned();
    eventually("a warning", async || {
        let log = std::fs::read_to_string(&log).unwrap();
        let complaints = log.lines().filter(|line| line.contains("\"spans lost\""));
        complaints.count() == 1
    })
    .await;
    let metrics = format!("http://{}/metrics", stack.service("loms").unwrap().http());
    let metrics = http_client().unwrap().get(metrics).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let lost = metrics
        .lines()
        .find_map(|line| line.strip_prefix("loms_counter_spans_lost_total "));
    assert!(lost.expect("counted").parse::<u64>().unwrap() >= 6);
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_that_nobody_paid_has_a_trace_too() {
    let agent = Agent::start().await;
    let settings =
        json!({"loms": {"jaeger": agent.section(), "orders": {"payment_timeout": "1s"}}});
    let stack = TestStack::start_with(settings, &[(1, HEART, 1)]).await;
    let body = json!({"user": USER, "items": [{"sku": HEART, "count": 1}]});
    let (_, made) = call(&stack, Door::Loms, "/createOrder", body).await;
    let order = made["orderID"].as_str().unwrap().to_owned();
    let swept = agent
        .find("the sweep", |span| span.name == "expiry.cancel")
        .await;
    assert_eq!(swept.parent, 0);
    let sent = agent.find("its event", |span| {
        (span.trace.as_str(), span.parent) == (&swept.trace, swept.id)
            && span.tag("event.sequence") == Some("3")
    });
    assert_eq!(sent.await.tag("order.id"), Some(order.as_str()));
    stack.finish().await;
}
