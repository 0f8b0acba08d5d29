//! The service, started in process on ports of its own, and what tests ask of it.

use std::time::Duration;

use notifications::{app::App, config::Config};
use proto::notifications::{
    Date, GetHistoryWithPeriodRequest, GetHistoryWithPeriodResponse,
    notifications_client::NotificationsClient,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::kafka::Kafka;

pub(crate) struct TestApp {
    pub(crate) grpc: NotificationsClient<Channel>,
    pub(crate) http: String,
    pub(crate) pool: PgPool,
    stop: CancellationToken,
    running: JoinSet<anyhow::Result<()>>,
    finished: bool,
}

/// Settings for the database behind `pool`; waits are short, so that tests are.
pub(crate) fn settings(pool: &PgPool, kafka: &Kafka, changes: Value) -> Value {
    let mut settings = json!({
        "grpc": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0"},
        "tls": {"enabled": false},
        "postgres": {"connection_string": testkit::url(pool)},
        "brokers": [kafka.brokers],
        "kafka": {"topic": kafka.topic, "dead_letter_topic": kafka.dead_letter_topic, "group": kafka.group,
                  "session_timeout": "6s"},
        "inbox": {"longest_backoff": "300ms"},
        "telegram": {"timeout": "1s"},
        "delivery": {"poll": "50ms", "backoff": "50ms", "longest_backoff": "100ms", "max_attempts": 3, "lease": "3s"},
        "limits": {"request_timeout": "20s"},
    });
    merge(&mut settings, changes);
    settings
}

pub(crate) fn config(pool: &PgPool, kafka: &Kafka, changes: Value) -> Config {
    serde_json::from_value(settings(pool, kafka, changes)).expect("a config")
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

impl TestApp {
    pub(crate) async fn start(pool: &PgPool, kafka: &Kafka, changes: Value) -> TestApp {
        let app = App::bind(config(pool, kafka, changes))
            .await
            .expect("bound");
        let address = format!("http://{}", app.grpc_addr());
        let http = format!("http://{}", app.http_addr());
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(app.run(stop.clone().cancelled_owned()));
        let channel = Channel::from_shared(address)
            .expect("an address")
            .connect()
            .await
            .expect("served");
        let grpc = NotificationsClient::new(channel).max_decoding_message_size(usize::MAX);
        TestApp {
            grpc,
            http,
            pool: pool.clone(),
            stop,
            running,
            finished: false,
        }
    }

    /// Stops the service as a signal does and expects a clean end.
    pub(crate) async fn finish(mut self) {
        self.stop.cancel();
        self.running
            .join_next()
            .await
            .expect("it ran")
            .expect("no panic")
            .expect("a clean end");
        self.finished = true;
    }

    /// The whole history of a user.
    pub(crate) async fn history(&self, user: i64) -> GetHistoryWithPeriodResponse {
        let request = request(user, (1, 1, 1), (9999, 12, 31));
        self.grpc
            .clone()
            .get_history_with_period(request)
            .await
            .expect("a history")
            .into_inner()
    }

    /// `(order, status)` of a user's whole history.
    pub(crate) async fn statuses(&self, user: i64) -> Vec<(i64, String)> {
        let messages = self.history(user).await.messages;
        messages
            .into_iter()
            .map(|message| (message.order_id, message.status))
            .collect()
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let request = reqwest::Client::new()
            .post(format!("{}{path}", self.http))
            .body(body.to_owned());
        let response = request.send().await.expect("an answer");
        (
            response.status().as_u16(),
            response.json().await.expect("JSON"),
        )
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let response = reqwest::get(format!("{}{path}", self.http))
            .await
            .expect("an answer");
        response.json().await.expect("JSON")
    }

    /// What `/metrics` says of a series; 0 where it is not there yet.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let text = reqwest::get(format!("{}/metrics", self.http))
            .await
            .expect("an answer");
        let text = text.text().await.expect("text");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().expect("a number"))
    }

    pub(crate) async fn count(&self, condition: &str) -> i64 {
        count(&self.pool, condition).await
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.finished, "the test forgot app.finish()");
        }
    }
}

/// Rows of `notifications.message` that fulfil a condition.
pub(crate) async fn count(pool: &PgPool, condition: &str) -> i64 {
    let statement = format!("SELECT count(*) FROM notifications.message WHERE {condition}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(statement))
        .fetch_one(pool)
        .await
        .expect("a count")
}

/// The size of a test of load: all of it, or the percentage in `NOTIFICATIONS_TEST_SCALE`.
pub(crate) fn scaled(size: usize) -> usize {
    let wanted = std::env::var("NOTIFICATIONS_TEST_SCALE").unwrap_or_else(|_| "100".into());
    let percent: usize = wanted
        .parse()
        .expect("NOTIFICATIONS_TEST_SCALE is a number");
    size * percent / 100
}

/// What a test draws its chances from; printed, and the output of a test that fails is shown.
pub(crate) fn seed() -> u64 {
    let wanted = std::env::var("NOTIFICATIONS_TEST_SEED");
    let seed = wanted.map_or_else(
        |_| rand::random(),
        |seed| seed.parse().expect("NOTIFICATIONS_TEST_SEED is a number"),
    );
    println!("again with NOTIFICATIONS_TEST_SEED={seed}");
    seed
}

pub(crate) fn date((year, month, day): (i32, i32, i32)) -> Option<Date> {
    Some(Date { year, month, day })
}

pub(crate) fn request(
    user: i64,
    from: (i32, i32, i32),
    to: (i32, i32, i32),
) -> GetHistoryWithPeriodRequest {
    GetHistoryWithPeriodRequest {
        user,
        from: date(from),
        to: date(to),
        ..Default::default()
    }
}

/// Waits until `condition` holds, longer than a busy machine needs.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let until = tokio::time::Instant::now() + Duration::from_secs(120);
    while !condition().await {
        assert!(tokio::time::Instant::now() < until, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
