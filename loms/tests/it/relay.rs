//! Who sends: one relay at a time has the lease, none keeps a transaction open while the broker is waited for, and however
//! two of them overlap, first occurrences are in order and every event is counted once.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::PgPool;

use crate::{
    kafka, oracle,
    proxy::Proxy,
    test_app::{TestApp, eventually},
};

const WAITING: &str = "SELECT count(*) FROM loms.outbox";

/// What a migration does: it wants the table for itself, for a moment, and everybody else queues behind it.
const ALTER: &str = "BEGIN;
    SET LOCAL lock_timeout = '1s';
    ALTER TABLE loms.status_change ADD CONSTRAINT probe CHECK (sequence > 0) NOT VALID;
    ALTER TABLE loms.status_change DROP CONSTRAINT probe;
    COMMIT";

#[tokio::test]
async fn a_broker_that_is_away_keeps_no_transaction_open() {
    let pool = crate::database().await;
    let mut broker = Proxy::closed(&kafka::brokers());
    let outbox = json!({"broker_timeout": "60s", "poll_interval": "50ms"});
    let changes = json!({"brokers": [broker.address.to_string()], "outbox": outbox});
    let app = TestApp::start(&pool, changes).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    waits_for_the_broker(&pool).await;
    for _ in 0..20 {
        let altered = sqlx::raw_sql(ALTER).execute(&pool).await;
        altered.expect("the lock within a second");
        let id = app.create(1, &[(7, 1)]).await.order_id;
        app.pay(id).await.unwrap();
        let open = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'loms-relay'
                      AND state LIKE 'idle in transaction%' AND clock_timestamp() - xact_start > interval '1 s'";
        assert_eq!(oracle::count(&pool, open).await, 0, "idle in transaction");
    }
    assert_eq!(oracle::count(&pool, WAITING).await, 2 + 20 * 3);
    // it keeps its lease meanwhile
    let until = "SELECT extract(epoch FROM leased_until)::bigint FROM loms.relay";
    let first = oracle::count(&pool, until).await;
    eventually("a renewal", async || {
        oracle::count(&pool, until).await > first
    })
    .await;
    broker.open();
    app.finish().await;
}

/// A relay that looks again and again is quiet only while it waits for the broker.
async fn waits_for_the_broker(pool: &PgPool) {
    eventually("a relay that waits for the broker", async || {
        let quiet = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'loms-relay'
                       AND clock_timestamp() - query_start > interval '500 ms'";
        oracle::count(pool, quiet).await == 1
    })
    .await;
}

#[tokio::test]
async fn a_relay_that_has_lost_its_lease_sends_no_more_of_its_batch() {
    let pool = crate::database().await;
    let mut broker = Proxy::closed(&kafka::brokers());
    let outbox = json!({"broker_timeout": "60s", "poll_interval": "50ms"});
    let changes = json!({"brokers": [broker.address.to_string()], "outbox": outbox});
    let app = TestApp::start(&pool, changes).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    waits_for_the_broker(&pool).await;
    let take = "UPDATE loms.relay SET holder = gen_random_uuid(), leased_until = clock_timestamp() + interval '1 hour'";
    oracle::run(&pool, take).await;
    eventually("another look at the outbox", async || {
        let looked = "SELECT count(*) FROM pg_stat_activity, loms.relay
                      WHERE datname = current_database() AND application_name = 'loms-relay' AND query = 'COMMIT'
                        AND query_start > leased_until - interval '1 hour'";
        oracle::count(&pool, looked).await == 1
    })
    .await;
    broker.open();
    eventually("a broker that is back", async || {
        app.get("/readyz").await.json()["kafka"] == "ok"
    })
    .await;
    assert_eq!(kafka::read_log(&app.topic).await.len(), 0);
    assert_eq!(oracle::count(&pool, WAITING).await, 2);
    oracle::run(&pool, "UPDATE loms.relay SET leased_until = 'epoch'").await;
    app.finish().await;
}

#[tokio::test]
async fn a_relay_that_stops_is_succeeded_at_once() {
    let pool = crate::database().await;
    let one = TestApp::start(&pool, json!({})).await;
    one.receive("d1", &[(1, 7, 100)]).await.unwrap();
    one.create(1, &[(7, 1)]).await;
    let sent = async || oracle::count(&pool, WAITING).await == 0;
    eventually("events sent by the only relay", sent).await;
    let other = one.replica().await;
    one.stop().await.unwrap();
    let started = Instant::now();
    other.create(1, &[(7, 1)]).await;
    eventually("events sent by the other", sent).await;
    // the lease of one that died would be waited for: ten seconds
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    other.finish().await;
}

/// The release before keeps this lock, `LOMS rel` in ASCII, from reading a batch to deleting it.
#[tokio::test]
async fn nothing_is_read_while_a_relay_of_the_release_before_sends() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let mut old = pool.begin().await.unwrap();
    // shared ones of ours come and go
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(0x4c4f_4d53_2072_656c_i64)
        .execute(&mut *old)
        .await
        .unwrap();
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    let mut looked = String::new();
    for _ in 0..10 {
        let query = "SELECT coalesce(max(query_start)::text, '') FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'loms-relay'";
        eventually("another look", async || {
            let (at,): (String,) = oracle::rows(&pool, query).await.remove(0);
            at != looked
        })
        .await;
        looked = oracle::rows::<(String,)>(&pool, query).await.remove(0).0;
    }
    assert_eq!(oracle::count(&pool, WAITING).await, 2);
    assert_eq!(kafka::read_log(&app.topic).await.len(), 0);
    old.rollback().await.unwrap();
    app.finish().await;
}

/// Frozen with a batch that the broker may have, or has, and thawed when another relay has sent all of it and more.
#[cfg(feature = "failpoints")]
#[tokio::test]
async fn frozen_for_longer_than_its_lease() {
    let pool = crate::database().await;
    use loms::CrashPoint;

    use crate::process::{self, File, Process};

    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let changes = json!({
        "admin": {"allow_unauthenticated": true},
        "outbox": {"broker_timeout": "4s", "poll_interval": "50ms"},
    });
    let config = process::config(&pool, &topic, &changes);
    let stock = File::new("warehouse_id,sku,count\n1,7,1000\n");
    let received = process::run(&config, &["stock", "receive", stock.path()]).await;
    assert!(received.status.success(), "{received:?}");
    let sent = async || oracle::count(&pool, WAITING).await == 0;

    for point in [CrashPoint::EventsProduced, CrashPoint::EventsAcknowledged] {
        // it has the lease by its first batch, and freezes with its second
        let freeze = format!("{}=1*off->1*return(stop)", point.name());
        let frozen = Process::start_with(&config, &freeze).await;
        buy(&frozen).await;
        eventually("the first batch", sent).await;
        let other = Process::start(&config).await;
        let order = buy(&other).await;
        frozen.frozen().await;
        // what comes next of an order whose events are in the frozen batch, and of others
        pay(&other, order).await;
        for _ in 0..5 {
            let order = buy(&other).await;
            pay(&other, order).await;
        }
        assert!(!sent().await, "nobody has the lease but the frozen one");
        eventually("events sent by the other", sent).await;
        buy(&other).await;
        eventually("more of them", sent).await;
        frozen.signal("-CONT");
        let ended = other.stop().await;
        assert!(ended.success(), "{ended:?}");
        let order = buy(&frozen).await;
        pay(&frozen, order).await;
        eventually("events sent by the thawed one", sent).await;
        let ended = frozen.stop().await;
        assert!(ended.success(), "{ended:?}");
    }
    oracle::recount(&pool, &topic).await;
    let audit = process::run(&config, &["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
    oracle::no_deadlocks(&pool).await;
}

#[cfg(feature = "failpoints")]
async fn buy(process: &crate::process::Process) -> i64 {
    let request = crate::test_app::order(1, &[(7, 1)], "");
    let placed = process.client().create_order(request).await;
    placed.expect("an order").into_inner().order_id
}

#[cfg(feature = "failpoints")]
async fn pay(process: &crate::process::Process, order_id: i64) {
    let request = proto::loms::OrderPayedRequest { order_id };
    let payed = process.client().order_payed(request).await;
    payed.expect("a payment");
}
