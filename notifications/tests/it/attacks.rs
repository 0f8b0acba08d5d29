//! What a caller sends, or does not read, stops nothing: each attack once, small, on a process of
//! its own. See `testkit::attack` for how large ones are run.

use prost::Message as _;
use proto::notifications::notifications_client::NotificationsClient;
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::{
    attack::{Attacked, floods, post, scaled, unread},
    process::File,
};
use tonic::transport::Channel;

use crate::{
    kafka::Kafka,
    test_app::{request, settings},
};

const HISTORY: &str = "/notifications.Notifications/GetHistoryWithPeriod";
/// Whose history is long, and whose is short.
const LONG: i64 = 1;
const SHORT: i64 = 2;

async fn fill(pool: &PgPool, user: i64, count: u32) {
    let statement = "INSERT INTO notifications.message
        (user_id, order_id, sequence, status, message, created_at, source_topic, source_partition, source_offset,
         told_at)
        SELECT $1, $1 * 1000000 + i, 1, 'new', repeat('long ', 30),
               now(), 'orders', 0, $1 * 1000000 + i, now()
        FROM generate_series(1, $2) AS i";
    let insert = sqlx::query(statement).bind(user).bind(i64::from(count));
    insert.execute(pool).await.expect("filled");
}

/// The service, and its database, which lives as long.
async fn target(limits: Value) -> (Attacked, PgPool) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let pool = crate::database().await;
    fill(&pool, LONG, scaled(2_000).min(10_000)).await;
    fill(&pool, SHORT, 3).await;
    let kafka = Kafka::new().await;
    let changes = json!({"limits": limits, "log": {"level": "warn"}});
    let config = settings(&pool, &kafka, changes).to_string();
    let config = File::new(&config.replace('$', "$$"));
    let built = env!("CARGO_BIN_EXE_notifications");
    let process = testkit::Process::start(built, &config, "").await;
    let (grpc, http) = (process.grpc(), process.http());
    crate::test_app::eventually("ready", || async {
        let ready = reqwest::get(format!("http://{http}/readyz")).await;
        ready.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    let caller = move || {
        let endpoint = Channel::from_shared(format!("http://{grpc}")).expect("an address");
        let mut client = NotificationsClient::new(endpoint.connect_lazy());
        let (web, url) = (reqwest::Client::new(), format!("http://{http}/history"));
        async move || {
            let history = client
                .get_history_with_period(request(SHORT, (2000, 1, 1), (9999, 12, 31)))
                .await;
            let history = history.map_err(|status| status.to_string())?;
            match history.into_inner().messages.len() {
                3 => post(&web, &url, &question(SHORT)).await,
                messages => Err(format!("{messages} messages")),
            }
        }
    };
    let attacked = Attacked::start("notifications", (process, config), caller).await;
    (attacked, pool)
}

/// The whole history of a user, over HTTP.
fn question(user: i64) -> Value {
    let (from, to) = (
        json!({"year": 2000, "month": 1, "day": 1}),
        json!({"year": 9999, "month": 12, "day": 31}),
    );
    json!({"user": user.to_string(), "from": from, "to": to})
}

fn long() -> Vec<u8> {
    request(LONG, (2000, 1, 1), (9999, 12, 31)).encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn histories_that_are_not_read() {
    let (target, _pool) = target(json!({"write_timeout": "1s", "idle_timeout": "3s"})).await;
    unread::windows(&target, HISTORY, &long()).await;
    unread::sockets(&target, HISTORY, &long()).await;
    unread::requests(&target, "/history", &question(LONG).to_string()).await;
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_streams_and_beginnings() {
    let (target, _pool) = target(json!({"idle_timeout": "2s", "request_timeout": "2s"})).await;
    floods::of_streams(&target, HISTORY).await;
    floods::of_frames(&target, HISTORY).await;
    floods::of_metadata(&target, HISTORY).await;
    floods::of_beginnings(&target, "/history").await;
    target.finish().await;
}
