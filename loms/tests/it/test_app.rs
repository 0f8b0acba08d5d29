//! LOMS, started in process on ports of its own, and what tests ask of it.

use std::{
    future::Future,
    net::SocketAddr,
    sync::LazyLock,
    time::{Duration, Instant, SystemTime},
};

use loms::{App, Config};
use pbjson_types::Timestamp;
use platform::{
    config::{GraylogConfig, JaegerConfig, LogConfig},
    telemetry,
};
use proto::loms::{self as pb, loms_client::LomsClient};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use sqlx::{PgPool, Postgres, Transaction};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::{kafka, oracle};

/// A service that runs. It must be finished: dropping it before that fails the test.
pub(crate) struct TestApp {
    pub(crate) grpc: LomsClient<Channel>,
    pub(crate) channel: Channel,
    pub(crate) grpc_addr: SocketAddr,
    pub(crate) url: String,
    pub(crate) topic: String,
    pub(crate) config: Config,
    pool: PgPool,
    web: reqwest::Client,
    stop: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    finished: bool,
}

/// An answer over HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// A config for the database behind `pool`, with `changes` on top. Bounds are generous: a busy machine is no failure, and a
/// test of a bound sets it.
pub(crate) fn config(pool: &PgPool, changes: Value) -> Config {
    let mut config = json!({
        "grpc": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0"},
        "tls": {"enabled": false},
        "admin": {"allow_unauthenticated": true},
        "postgres": {
            "connection_string": testkit::url(pool),
            "acquire_timeout": "10s",
            "lock_timeout": "10s",
        },
        "limits": {"request_timeout": "15s"},
        "brokers": [kafka::brokers()],
        "kafka": {"topic": "orders"},
        "outbox": {"poll_interval": "50ms", "broker_timeout": "2s"},
    });
    merge(&mut config, changes);
    serde_json::from_value(config).expect("a config")
}

fn merge(into: &mut Value, changes: Value) {
    match changes {
        Value::Object(changes) if into.is_object() => {
            for (key, change) in changes {
                merge(&mut into[key], change);
            }
        }
        change => *into = change,
    }
}

/// Once for the process: the crypto that reqwest wants chosen, and a tracer, which lives as long as its handle.
static INIT: LazyLock<telemetry::Telemetry> = LazyLock::new(|| {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    // the service's hook writes to its log; a test's panic belongs on the screen
    let hook = std::panic::take_hook();
    let level = std::env::var("TEST_LOG").unwrap_or_else(|_| "off".into());
    let telemetry = telemetry::init(
        "loms",
        &LogConfig { level },
        &JaegerConfig::default(),
        &GraylogConfig::default(),
    )
    .expect("telemetry");
    std::panic::set_hook(hook);
    telemetry
});

impl TestApp {
    /// Starts the service with a topic of its own, unless `changes` name one, and waits until it is ready.
    pub(crate) async fn start(pool: &PgPool, changes: Value) -> TestApp {
        let app = TestApp::start_unready(pool, changes).await;
        eventually("readiness", async || app.get("/readyz").await.status == 200).await;
        app
    }

    /// The same, and does not wait: its database may be away.
    pub(crate) async fn start_unready(pool: &PgPool, mut changes: Value) -> TestApp {
        if changes["kafka"]["topic"].is_null() {
            let topic = kafka::unused_topic();
            kafka::create_topic(&topic).await;
            changes["kafka"]["topic"] = topic.into();
        }
        LazyLock::force(&INIT);
        let config = config(pool, changes);
        let app = App::bind(config.clone()).await.expect("bound");
        let (address, url) = (app.grpc_addr(), format!("http://{}", app.http_addr()));
        let (stop, mut running) = (CancellationToken::new(), JoinSet::new());
        running.spawn(app.run(stop.clone().cancelled_owned()));
        let channel = Channel::from_shared(format!("http://{address}"))
            .expect("an address")
            .connect()
            .await
            .expect("served");
        TestApp {
            grpc: LomsClient::new(channel.clone()),
            channel,
            grpc_addr: address,
            url,
            topic: config.kafka.topic.clone(),
            config,
            pool: pool.clone(),
            web: reqwest::Client::new(),
            stop,
            running,
            finished: false,
        }
    }

    /// Another process of the same service: same database, same topic.
    pub(crate) async fn replica(&self) -> TestApp {
        TestApp::start(&self.pool, json!({"kafka": {"topic": self.topic}})).await
    }

    /// Waits until every event has left, stops the service as a signal does, and recounts everything.
    pub(crate) async fn finish(self) {
        let pool = self.pool.clone();
        eventually("an empty outbox", async || {
            oracle::count(&pool, "SELECT count(*) FROM loms.outbox").await == 0
        })
        .await;
        let (config, topic) = (self.config.clone(), self.topic.clone());
        self.stop().await.expect("a clean end");
        let report = loms::audit(&config).await.expect("an audit");
        assert!(report.differences.is_empty(), "{report}");
        oracle::recount(&pool, &topic).await;
    }

    /// Stops the service as a signal does, and returns how it ended.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.finished = true;
        self.begin_stop();
        self.ended().await
    }

    pub(crate) fn begin_stop(&self) {
        self.stop.cancel();
    }

    pub(crate) async fn ended(mut self) -> anyhow::Result<()> {
        self.finished = true;
        let ended = tokio::time::timeout(Duration::from_secs(60), self.running.join_next()).await;
        ended.expect("an end").expect("it ran").expect("no panic")
    }

    pub(crate) async fn create(&self, user: i64, items: &[(u32, u32)]) -> pb::CreateOrderResponse {
        let created = self.try_create(order(user, items, "")).await;
        created.expect("an order")
    }

    pub(crate) async fn try_create(
        &self,
        request: pb::CreateOrderRequest,
    ) -> Result<pb::CreateOrderResponse, Status> {
        let answer = self.grpc.clone().create_order(request).await?;
        Ok(answer.into_inner())
    }

    pub(crate) async fn pay(&self, order_id: i64) -> Result<(), Status> {
        let request = pb::OrderPayedRequest { order_id };
        self.grpc.clone().order_payed(request).await.map(drop)
    }

    pub(crate) async fn cancel(&self, order_id: i64) -> Result<(), Status> {
        let request = pb::CancelOrderRequest { order_id };
        self.grpc.clone().cancel_order(request).await.map(drop)
    }

    pub(crate) async fn list(&self, order_id: i64) -> pb::ListOrderResponse {
        let request = pb::ListOrderRequest { order_id };
        let answer = self.grpc.clone().list_order(request).await;
        answer.expect("an order").into_inner()
    }

    /// `(warehouse, units)` on sale.
    pub(crate) async fn stocks(&self, sku: u32) -> Vec<(i64, u64)> {
        let answer = self.grpc.clone().stocks(pb::StocksRequest { sku }).await;
        let stocks = answer.expect("stocks").into_inner().stocks;
        stocks
            .into_iter()
            .map(|stock| (stock.warehouse_id, stock.count))
            .collect()
    }

    /// Books `(warehouse, SKU, units)`; whether they had been booked before.
    pub(crate) async fn receive(
        &self,
        delivery_id: &str,
        lines: &[(i64, u32, u64)],
    ) -> Result<bool, Status> {
        let lines = lines
            .iter()
            .map(|&(warehouse_id, sku, count)| pb::StockLine {
                warehouse_id,
                sku,
                count,
            });
        let request = pb::ReceiveStockRequest {
            delivery_id: delivery_id.into(),
            lines: lines.collect(),
        };
        let answer = self.grpc.clone().receive_stock(request).await?;
        Ok(answer.into_inner().already_received)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.web.get(format!("{}{path}", self.url))).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        self.send(self.request(path).body(body)).await
    }

    pub(crate) fn request(&self, path: &str) -> reqwest::RequestBuilder {
        self.web.post(format!("{}{path}", self.url))
    }

    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let answer = request.send().await.expect("an answer");
        Answer {
            status: answer.status().as_u16(),
            headers: answer.headers().clone(),
            text: answer.text().await.expect("text"),
        }
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.finished, "the test forgot app.finish()");
        }
    }
}

/// A request for `(SKU, units)`; an empty key is none.
pub(crate) fn order(user: i64, items: &[(u32, u32)], key: &str) -> pb::CreateOrderRequest {
    let items = items
        .iter()
        .map(|&(sku, count)| pb::OrderItem { sku, count });
    pb::CreateOrderRequest {
        user,
        items: items.collect(),
        idempotency_key: key.into(),
    }
}

/// A time of the contract; it must be there.
pub(crate) fn instant(at: Option<Timestamp>) -> SystemTime {
    let at = at.expect("a time");
    let seconds = u64::try_from(at.seconds).expect("after 1970");
    SystemTime::UNIX_EPOCH + Duration::new(seconds, at.nanos.cast_unsigned())
}

/// Waits until `condition` holds, longer than a busy machine needs.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let until = Instant::now() + Duration::from_secs(120);
    while !condition().await {
        assert!(Instant::now() < until, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// How many times its normal size a test of load has.
pub(crate) fn scale() -> usize {
    let wanted = std::env::var("LOMS_TEST_SCALE").unwrap_or_else(|_| "1".into());
    wanted.parse().expect("LOMS_TEST_SCALE is a number")
}

/// What a test draws its chances from; printed, and the output of a test that fails is shown.
pub(crate) fn seed() -> u64 {
    let wanted = std::env::var("LOMS_TEST_SEED");
    let seed = wanted.map_or_else(
        |_| rand::random(),
        |seed| seed.parse().expect("LOMS_TEST_SEED is a number"),
    );
    println!("again with LOMS_TEST_SEED={seed}");
    seed
}

/// Sits on rows, like somebody who left a psql open: `rows` is a table, or a table and a condition.
pub(crate) async fn sit_on(pool: &PgPool, rows: &str) -> Transaction<'static, Postgres> {
    let mut held = pool.begin().await.expect("a connection");
    let statement = sqlx::AssertSqlSafe(format!("SELECT FROM {rows} FOR UPDATE"));
    let locked = sqlx::query(statement).execute(&mut *held).await;
    assert!(locked.expect("the locks").rows_affected() > 0, "{rows}");
    held
}

/// An order whose deadline has passed and that nobody can cancel while it is held: every sweeper comes by as often as it can.
pub(crate) struct Lure {
    order: i64,
    held: Transaction<'static, Postgres>,
}

impl Lure {
    /// An order of one unit of SKU 7.
    pub(crate) async fn set(app: &TestApp) -> Lure {
        let order = app.create(1, &[(7, 1)]).await.order_id;
        let held = sit_on(&app.pool, &format!("loms.user_order WHERE id = {order}")).await;
        let due = "UPDATE loms.unpaid_order SET payment_deadline = now() WHERE order_id = $1";
        let done = sqlx::query(due).bind(order).execute(&app.pool).await;
        assert_eq!(done.expect("a deadline").rows_affected(), 1);
        Lure { order, held }
    }

    /// Lets it go, and waits until it is cancelled.
    pub(crate) async fn let_go(self, app: &TestApp) {
        self.held.rollback().await.expect("an end");
        eventually("the lure", async || {
            app.list(self.order).await.status == "cancelled"
        })
        .await;
    }
}

/// Waits until the service has all that was sent to it before: these are answered behind it on the same connection.
pub(crate) async fn arrived(app: &TestApp) {
    for _ in 0..20 {
        app.stocks(1).await;
    }
}

/// Waits until `many` statements in this test's database wait for a lock.
pub(crate) async fn lock_waiters(pool: &PgPool, many: i64) {
    eventually("statements that wait for a lock", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        oracle::count(pool, waiting).await >= many
    })
    .await;
}
