//! How a process ends: told once it finishes what it has begun and exits 0, told twice it is gone, and nothing that hangs keeps
//! it beyond its grace.

use std::time::{Duration, Instant};

use devstack::stack::{Options, Stack};
use nix::sys::signal::Signal;
use proto::loms::{ListOrderRequest, OrderPayedRequest, StocksRequest};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    replica::Replica,
    test_stack::{binaries, eventually},
};

async fn loms() -> Stack {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

/// Order 77 is locked, as by somebody who left a psql open, until the connection is dropped.
async fn sit_on_an_order(stack: &Stack) -> PgConnection {
    let url = stack.database("loms").unwrap();
    let mut db = PgConnection::connect(url).await.unwrap();
    let statements = "BEGIN; SELECT FROM loms.user_order WHERE id = 77 FOR UPDATE";
    let order = "INSERT INTO loms.user_order (id, user_id, status) VALUES (77, 1, 'cancelled')
                 ON CONFLICT DO NOTHING";
    sqlx::raw_sql(order).execute(&mut db).await.unwrap();
    sqlx::raw_sql(statements).execute(&mut db).await.unwrap();
    db
}

/// Waits until somebody waits for the order.
async fn somebody_waits(stack: &Stack) {
    let url = stack.database("loms").unwrap();
    let mut db = PgConnection::connect(url).await.unwrap();
    let by = Instant::now() + Duration::from_secs(20);
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while sqlx::query_scalar::<_, i64>(waiting)
        .fetch_one(&mut db)
        .await
        .unwrap()
        == 0
    {
        assert!(Instant::now() < by, "nobody waits for the order");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_call_in_progress_is_answered_and_nobody_else_is_let_in() {
    let stack = loms().await;
    let mut replica = Replica::start(&stack, &json!({"shutdown_grace": "10s"})).await;
    let held = sit_on_an_order(&stack).await;
    let (mut payer, mut asker) = (replica.stranger(), replica.stranger());
    asker.stocks(StocksRequest { sku: 1 }).await.unwrap();
    let mut health = HealthClient::new(replica.channel());
    let request = HealthCheckRequest {
        service: "loms.Loms".to_owned(),
    };
    let mut health = health.watch(request).await.unwrap().into_inner();
    let first = health.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    let pay = payer.order_payed(OrderPayedRequest { order_id: 77 });
    let stop = async {
        somebody_waits(&stack).await;
        let began = Instant::now();
        replica.signal(Signal::SIGTERM);
        // not ready comes first, while the call is still waiting
        let next = health.message().await.unwrap().unwrap();
        assert_eq!(next.status(), ServingStatus::NotServing);
        eventually("closed doors", async || {
            TcpStream::connect(replica.grpc).await.is_err()
                && TcpStream::connect(replica.http).await.is_err()
        })
        .await;
        // a call that was on its way when the connection was told to close is still served
        eventually("closed connections", async || {
            let late = asker.clone().stocks(StocksRequest { sku: 1 }).await;
            late.is_err_and(|late| late.code() == Code::Unavailable)
        })
        .await;
        drop(held);
        began
    };
    let (paid, began) = tokio::join!(pay, stop);
    // a cancelled order cannot be payed: that is the answer, and it has come
    assert_eq!(paid.unwrap_err().code(), Code::FailedPrecondition);
    let ended = replica.ended().await;
    assert_eq!(ended.code(), Some(0));
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    stack.stop().await.unwrap();
}

/// More of them than the kernel's buffers take of an answer that lists them: at least 5 MB.
const WAREHOUSES: i64 = 200_000;

/// What was read of an HTTP answer, its head apart from its body.
fn parts(answer: &[u8]) -> (&str, &[u8]) {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.expect("a whole head");
    let head = std::str::from_utf8(&answer[..end]).unwrap();
    (head, &answer[end + 4..])
}

#[tokio::test]
async fn a_slow_reader_and_a_slow_writer_are_waited_for() {
    let stack = loms().await;
    let mut db = PgConnection::connect(stack.database("loms").unwrap())
        .await
        .unwrap();
    let many = "INSERT INTO loms.stock (warehouse_id, sku, count) SELECT id, 77, 1 FROM generate_series(1, $1) AS id";
    let many = sqlx::query(many).bind(WAREHOUSES).execute(&mut db).await;
    many.unwrap();
    let settings = json!({"shutdown_grace": "20s", "postgres": {"statement_timeout": "20s"},
        "limits": {"request_timeout": "20s"}});
    let mut replica = Replica::start(&stack, &settings).await;

    // reads a little, then nothing for a while
    let mut reader = TcpStream::connect(replica.http).await.unwrap();
    let question = b"POST /stocks HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{\"sku\":77}";
    reader.write_all(question).await.unwrap();
    let mut answer = vec![0; 1024];
    reader.read_exact(&mut answer).await.unwrap();
    let mut writer = TcpStream::connect(replica.http).await.unwrap();
    let head =
        b"POST /stocks HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n";
    writer.write_all(head).await.unwrap();
    let mut go_on = [0; b"HTTP/1.1 100 Continue\r\n\r\n".len()];
    writer.read_exact(&mut go_on).await.unwrap();

    replica.signal(Signal::SIGTERM);
    // far longer than it takes to end with nothing in progress
    let ended = tokio::time::timeout(Duration::from_millis(1_500), replica.ended()).await;
    assert!(ended.is_err(), "ended before its answers: {ended:?}");
    writer.write_all(b"{\"sku\":7}").await.unwrap();
    let mut heard = Vec::new();
    writer.read_to_end(&mut heard).await.unwrap();
    assert!(parts(&heard).0.starts_with("HTTP/1.1 200"), "{heard:?}");

    let ended = tokio::time::timeout(Duration::from_millis(1_000), replica.ended()).await;
    assert!(ended.is_err(), "ended before its answer: {ended:?}");
    reader.read_to_end(&mut answer).await.unwrap();
    let (head, body) = parts(&answer);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let stocks: Value = serde_json::from_slice(body).expect("a whole answer");
    assert_eq!(
        stocks["stocks"].as_array().unwrap().len(),
        WAREHOUSES as usize
    );
    assert_eq!(replica.ended().await.code(), Some(0));
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let stack = loms().await;
    for second in [Signal::SIGTERM, Signal::SIGINT] {
        let mut replica = Replica::start(
            &stack,
            &json!({"shutdown_grace": "60s",
            "postgres": {"lock_timeout": "30s", "statement_timeout": "30s"},
            "limits": {"request_timeout": "30s"}}),
        )
        .await;
        let held = sit_on_an_order(&stack).await;
        let mut payer = replica.stranger();
        let pay = payer.order_payed(OrderPayedRequest { order_id: 77 });
        let stop = async {
            somebody_waits(&stack).await;
            replica.signal(Signal::SIGTERM);
            eventually("closed doors", async || {
                TcpStream::connect(replica.grpc).await.is_err()
            })
            .await;
            let began = Instant::now();
            replica.signal(second);
            assert_eq!(replica.ended().await.code(), Some(130));
            println!("ended {:?} after the second signal", began.elapsed());
            assert!(
                began.elapsed() < Duration::from_secs(2),
                "{:?}",
                began.elapsed()
            );
        };
        let (paid, ()) = tokio::join!(pay, stop);
        paid.unwrap_err();
        drop(held);
    }
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn nothing_that_hangs_keeps_it_beyond_its_grace() {
    let stack = loms().await;
    // Graylog is accepted by the kernel and reads nothing, Jaeger's datagrams are read by nobody
    let graylog = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let jaeger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let settings = json!({
        "shutdown_grace": "3s",
        "log": {"level": "trace"},
        "graylog": {"host": "127.0.0.1", "port": graylog.local_addr().unwrap().port()},
        "jaeger": {"host": "127.0.0.1", "port": jaeger.local_addr().unwrap().port()},
        "postgres": {"lock_timeout": "30s", "statement_timeout": "30s"},
        "limits": {"request_timeout": "30s"},
    });
    let mut replica = Replica::start(&stack, &settings).await;
    // a call that waits for a row, a caller who has sent half a request, one who says nothing
    let _held = sit_on_an_order(&stack).await;
    let mut payer = replica.stranger();
    let pay = payer.order_payed(OrderPayedRequest { order_id: 77 });
    let mut half = TcpStream::connect(replica.http).await.unwrap();
    half.write_all(b"POST /stocks HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        .await
        .unwrap();
    let _silent = TcpStream::connect(replica.grpc).await.unwrap();
    let stop = async {
        somebody_waits(&stack).await;
        let began = Instant::now();
        replica.signal(Signal::SIGTERM);
        let ended = replica.ended().await;
        (ended, began.elapsed())
    };
    let (paid, (ended, took)) = tokio::join!(pay, stop);
    paid.unwrap_err();
    println!("ended with {ended} after {took:?} of 3 s");
    assert_eq!(
        ended.code(),
        Some(1),
        "work was cut, and the exit code says so"
    );
    // the exit of a process on a busy machine is not the process's own time
    assert!(took < Duration::from_millis(3_500), "{took:?}");
    let mut rest = Vec::new();
    half.read_to_end(&mut rest).await.ok();
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_start_that_waits_for_a_silent_database_can_be_ended() {
    let stack = loms().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // accepts, and says nothing
        let database = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = database.local_addr().unwrap();
        let connection = format!("postgres://loms:loms@{address}/loms");
        let settings = json!({"postgres": {"connection_string": connection}});
        let mut asked = None;
        let starting = async { asked = Some(database.accept().await.unwrap()) };
        let (ended, took) = Replica::stopped_while(&stack, &settings, signal, starting).await;
        assert!(asked.is_some());
        assert_eq!(ended.code(), Some(0), "{signal}: {ended}");
        assert!(took < Duration::from_secs(3), "{signal}: {took:?}");
    }
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn every_wrong_setting_is_one_line_and_exit_code_64() {
    let stack = loms().await;
    let wrong: [(Value, &str); 16] = [
        (
            json!({"jaeger": {"sample_ratio": 1.5}}),
            "jaeger.sample_ratio = 1.5",
        ),
        (json!({"jaeger": {"sample_rate": 1}}), "jaeger"),
        (json!({"graylog": {"port": 70_000}}), "graylog.port"),
        (json!({"log": {"level": "loud=much"}}), "log.level"),
        (json!({"tls": {"client_auth": "maybe"}}), "tls.client_auth"),
        (
            json!({"tls": {"client_ca": "nowhere.pem"}}),
            "tls.client_ca nowhere.pem",
        ),
        (
            json!({"tls": {"enabled": false, "client_auth": "required"}}),
            "tls.client_auth",
        ),
        (json!({"limits": {"in_flight": 0}}), "limits.in_flight"),
        (
            json!({"limits": {"idle_timeout": "0s"}}),
            "limits.idle_timeout",
        ),
        (
            json!({"limits": {"request_timeout": "0s"}}),
            "limits.request_timeout",
        ),
        (
            json!({"limits": {"header_bytes": "many"}}),
            "limits.header_bytes",
        ),
        (
            json!({"postgres": {"lock_timeout": "0s"}}),
            "postgres.lock_timeout",
        ),
        (json!({"shutdown_grace": "1s"}), "shutdown_grace"),
        (json!({"orders": {"max_lines": 0}}), "orders.max_lines"),
        (json!({"outbox": {"batch": 0}}), "outbox.batch"),
        (json!({"audit": {"every": "often"}}), "audit.every"),
    ];
    for (setting, named) in wrong {
        let output = Replica::refused(&stack, &setting).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{setting}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{setting}: {said}");
        assert!(said.contains(named), "{setting}: {said}");
        assert!(output.stdout.is_empty(), "{setting}: nothing was announced");
    }
    let mut loms = stack_caller(&stack);
    let request = ListOrderRequest { order_id: 1 };
    assert_eq!(
        loms.list_order(request).await.unwrap_err().code(),
        Code::NotFound
    );
    stack.stop().await.unwrap();
}

/// A caller of a stack's LOMS who shows nothing.
pub(crate) fn stack_caller(
    stack: &Stack,
) -> proto::loms::loms_client::LomsClient<tonic::transport::Channel> {
    let ca = std::fs::read(stack.ca()).unwrap();
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(ca));
    let address = stack.service("loms").unwrap().grpc();
    proto::loms::loms_client::LomsClient::new(devstack::clients::channel(address, tls).unwrap())
}
