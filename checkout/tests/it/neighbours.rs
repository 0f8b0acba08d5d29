//! How each call is answered beside a neighbour in trouble, and what a neighbour gets to see of a call.

use std::{net::SocketAddr, time::Duration};

use futures::future::{join_all, join4};
use proto::cart::AddToCartRequest;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::Instant,
};
use tonic::{Code, metadata::MetadataMap};

use crate::{
    loms_stub::Mood,
    process::Process,
    proxy::{Line, Proxy},
    test_app::{Neighbours, TestApp, config, connect, eventually, fill, post},
};

/// Of checkout's call to LOMS.
const LOMS_TIMEOUT: Duration = Duration::from_secs(3);
/// What a caller in a hurry waits.
const HURRY: Duration = Duration::from_millis(700);
/// What one waits who cannot wait for another try.
const GREAT_HURRY: Duration = Duration::from_millis(120);
/// What a machine with other things to do may add to a bound: the caller in a hurry still has his answer before LOMS's
/// time is over, and who waits has his before that of the request.
const GRACE: Duration = Duration::from_secs(2);

fn bounds() -> Value {
    json!({
        "loms": {"timeout": "3s", "connect_timeout": "300ms"},
        // no worker comes to help
        "purchases": {"first_backoff": "1h", "most_backoff": "1h", "resume_after": "1h"},
    })
}

/// The answers of AddToCart, DeleteFromCart, ListCart and Purchase, each of a user with a cart, by a caller who waits so
/// long, and that there was one within `bound`.
async fn answers(app: &TestApp, wait: Option<Duration>, bound: Duration) -> [Code; 4] {
    let call = async |path: &str, body: Value| {
        let began = Instant::now();
        let code = app.code(path, body, wait).await;
        assert!(
            began.elapsed() < bound + GRACE,
            "{path}: {:?}",
            began.elapsed()
        );
        code
    };
    let (add, delete, list, purchase) = join4(
        call("/addToCart", json!({"user": 1, "sku": 5, "count": 1})),
        call("/deleteFromCart", json!({"user": 2, "sku": 5, "count": 1})),
        call("/listCart", json!({"user": 3})),
        call("/purchase", json!({"user": 4})),
    )
    .await;
    [add, delete, list, purchase]
}

#[tokio::test]
async fn each_call_beside_a_loms_in_trouble() {
    let pool = crate::database().await;
    let app = TestApp::start_with(pool, bounds()).await;
    app.loms.stock(5, 10_000);
    let hangs = Mood::Slow(Duration::from_secs(3600));
    // LOMS, then what adding and buying answer; deleting and listing need no LOMS
    let table = [
        (Mood::Well, Code::Ok, Code::Ok),
        (Mood::Slow(Duration::from_millis(100)), Code::Ok, Code::Ok),
        (Mood::Away, Code::Unavailable, Code::Unavailable),
        (Mood::Busy, Code::ResourceExhausted, Code::ResourceExhausted),
        (Mood::Broken, Code::Internal, Code::Internal),
        (Mood::LosesAnswers, Code::Ok, Code::Unavailable),
        (Mood::Refusing, Code::Ok, Code::FailedPrecondition),
        (hangs, Code::DeadlineExceeded, Code::DeadlineExceeded),
    ];
    for (mood, add, purchase) in table {
        for (wait, bound) in [(Some(HURRY), HURRY), (None, LOMS_TIMEOUT)] {
            app.loms.mood(Mood::Well);
            for user in 1..=4 {
                app.add(user, 5, 2).await.unwrap();
            }
            app.loms.mood(mood);
            let got = answers(&app, wait, bound).await;
            assert_eq!(
                got,
                [add, Code::Ok, Code::Ok, purchase],
                "{mood:?} {wait:?}"
            );
            app.loms.mood(Mood::Well);
            // whatever became of it, the user can buy what is left, and nothing is ordered twice
            while app.open_purchases().await > 0 || !app.cart(4).await.is_empty() {
                app.purchase(4).await.unwrap();
            }
        }
    }
    let ordered = app
        .loms
        .orders()
        .into_iter()
        .filter(|order| order.user == 4);
    let units: u32 = ordered
        .flat_map(|order| order.lines)
        .map(|(_, count)| count)
        .sum();
    assert_eq!(
        units,
        2 * 2 * u32::try_from(table.len()).unwrap(),
        "what user 4 put into the cart"
    );
    app.finish().await;
}

#[tokio::test]
async fn who_cannot_wait_for_another_try_hears_that_loms_is_away() {
    let pool = crate::database().await;
    let app = TestApp::start_with(pool, bounds()).await;
    app.loms.stock(5, 10_000);
    for user in 1..=2 {
        app.add(user, 5, 2).await.unwrap();
    }
    app.loms.mood(Mood::Away);
    // longer than one wait between tries, shorter than two
    let wait = Some(GREAT_HURRY);
    for _ in 0..5 {
        let add = json!({"user": 1, "sku": 5, "count": 1});
        assert_eq!(app.code("/addToCart", add, wait).await, Code::Unavailable);
        let buy = json!({"user": 2});
        assert_eq!(app.code("/purchase", buy, wait).await, Code::Unavailable);
    }
    app.loms.mood(Mood::Well);
    assert_eq!(app.purchase(2).await.unwrap(), 1);
    assert_eq!(app.cart(1).await, [(5, 2)]);
    app.finish().await;
}

/// A service whose line to LOMS can be cut.
async fn over_a_line(pool: PgPool, changes: Value) -> (TestApp, Proxy) {
    let neighbours = Neighbours::start().await;
    let line = Proxy::start(neighbours.addresses[0].to_string()).await;
    let mut changes = changes;
    changes["services"] = json!({"loms": line.address.to_string()});
    let app = TestApp::beside(neighbours, pool, changes).await;
    (app, line)
}

#[tokio::test]
async fn each_call_over_a_line_that_is_cut_or_silent() {
    let pool = crate::database().await;
    let (app, line) = over_a_line(pool, bounds()).await;
    app.loms.stock(5, 10_000);
    for (state, code) in [
        (Line::Cut, Code::Unavailable),
        (Line::Silent, Code::DeadlineExceeded),
    ] {
        for (wait, bound) in [(Some(HURRY), HURRY), (None, LOMS_TIMEOUT)] {
            for user in 1..=4 {
                app.add(user, 5, 2).await.unwrap();
            }
            line.set(state);
            let got = answers(&app, wait, bound).await;
            assert_eq!(got, [code, Code::Ok, Code::Ok, code], "{state:?} {wait:?}");
            line.set(Line::Up);
            eventually("the order is made", async || app.purchase(4).await.is_ok()).await;
            assert_eq!(app.open_purchases().await, 0);
        }
    }
    assert_eq!(app.loms.orders().len(), 4);
    app.finish().await;
}

/// A host that takes no connection: its queue is full, so the kernel lets the next one wait as a dead host would.
struct DeadHost {
    address: SocketAddr,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl DeadHost {
    async fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = vec![];
        let connect = || TcpStream::connect(address);
        while let Ok(taken) = tokio::time::timeout(Duration::from_millis(200), connect()).await {
            queued.push(taken.unwrap());
        }
        Self {
            address,
            _listener: listener,
            _queued: queued,
        }
    }
}

#[tokio::test]
async fn a_loms_that_takes_no_connection_is_unavailable_soon() {
    let pool = crate::database().await;
    let host = DeadHost::new().await;
    let mut changes = bounds();
    changes["services"] = json!({"loms": host.address.to_string()});
    changes["loms"] = json!({"timeout": "60s", "connect_timeout": "200ms"});
    changes["limits"] = json!({"request_timeout": "60s"});
    let app = TestApp::start_with(pool, changes).await;
    let began = Instant::now();
    let code = app
        .code("/addToCart", json!({"user": 1, "sku": 5, "count": 1}), None)
        .await;
    assert_eq!(code, Code::Unavailable);
    // three tries of 200 ms and the waits between them
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    app.finish().await;
}

#[tokio::test]
async fn many_callers_of_a_loms_that_takes_no_connection_wait_for_it_once() {
    let pool = crate::database().await;
    let host = DeadHost::new().await;
    let mut changes = bounds();
    changes["services"] = json!({"loms": host.address.to_string()});
    let app = TestApp::start_with(pool, changes).await;
    // one attempt takes 300 ms: three fit, one after the other
    let call = async |user: i64| {
        let add = json!({"user": user, "sku": 5, "count": 1});
        app.code("/addToCart", add, Some(Duration::from_secs(1)))
            .await
    };
    let codes = join_all((1..=20).map(call)).await;
    assert_eq!(codes, [Code::Unavailable; 20]);
    app.finish().await;
}

#[tokio::test]
async fn a_neighbour_has_one_connection() {
    let pool = crate::database().await;
    let (app, line) = over_a_line(pool, json!({})).await;
    app.loms.stock(5, 1_000);
    let added = join_all((1..=50).map(|user| app.add(user, 5, 1))).await;
    assert!(added.iter().all(Result::is_ok));
    assert_eq!(line.connections(), 1);
    app.finish().await;
}

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> &'a str {
    metadata
        .get(name)
        .unwrap_or_else(|| panic!("no {name}"))
        .to_str()
        .unwrap()
}

/// A `grpc-timeout`.
fn allowed(metadata: &MetadataMap) -> Duration {
    let value = text(metadata, "grpc-timeout");
    let (digits, unit) = value.split_at(value.len() - 1);
    let amount = digits.parse().unwrap();
    match unit {
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => panic!("{value}"),
    }
}

#[tokio::test]
async fn the_callers_time_and_trace_go_with_the_call() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    neighbours.loms.stock(5, 100);
    fill(&pool, 1, &(5..6)).await;
    // a process, because tests have no tracing of their own
    let process = Process::start(&config(&pool, neighbours.addresses, &json!({})));
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let caller = format!("00-{trace}-00f067aa0ba902b7-01");
    let call = async |path: &str, wait: &str| {
        let body = json!({"user": 1, "sku": 5, "count": 1}).to_string();
        let headers = [("traceparent", caller.as_str()), ("grpc-timeout", wait)];
        let answer = post(process.http, path, body, &headers).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-trace-id"], trace);
    };
    let same_trace = |metadata: &MetadataMap| {
        let sent = text(metadata, "traceparent");
        assert!(
            sent.starts_with(&format!("00-{trace}-")) && sent != caller,
            "{sent}"
        );
    };
    let between = |metadata: &MetadataMap, least: u64, most: u64| {
        let allowed = allowed(metadata);
        let expected = Duration::from_millis(least)..=Duration::from_millis(most);
        assert!(expected.contains(&allowed), "{allowed:?}");
    };

    for path in ["/addToCart", "/purchase"] {
        // less than LOMS may have: what is left of the caller's
        call(path, "2000m").await;
        same_trace(&neighbours.loms.last());
        between(&neighbours.loms.last(), 1_000, 1_999);
        fill_again(&process).await;
        // more than that
        call(path, "1H").await;
        between(&neighbours.loms.last(), 3_000, 4_000);
        fill_again(&process).await;
    }
    // a request for a product is not the caller's alone: its time is its own
    call("/listCart", "2000m").await;
    same_trace(&neighbours.products.last());
    between(&neighbours.products.last(), 2_500, 3_000);
}

async fn fill_again(process: &Process) {
    let request = AddToCartRequest {
        user: 1,
        sku: 5,
        count: 1,
    };
    connect(process.grpc)
        .await
        .add_to_cart(request)
        .await
        .unwrap();
}
