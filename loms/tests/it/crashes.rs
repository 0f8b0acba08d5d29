//! The service killed in the middle of its work, at moments of chance and on both sides of every commit: what was
//! acknowledged is there, what was not is whole or absent, and every event of it reaches the log in order.

use std::{process::ExitStatus, sync::atomic::Ordering, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use sqlx::PgPool;

use crate::{
    kafka,
    oracle::{self, no_deadlocks},
    process::{self, File, Process},
    test_app::{eventually, scale, seed},
    traders::{self, Traders},
};

/// Stock, a topic, and deadlines that come while the traders are busy with others.
async fn prepare(pool: &PgPool) -> (File, String) {
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let changes = json!({
        "orders": {"payment_timeout": "700ms"},
        "admin": {"allow_unauthenticated": true},
    });
    let config = process::config(pool, &topic, &changes);
    let stock = File::new(&traders::stock());
    let received = process::run(&config, &["stock", "receive", stock.path()]).await;
    assert!(received.status.success(), "{received:?}");
    (config, topic)
}

/// Waits until nothing is left to happen, stops the service, and recounts everything.
async fn finish(pool: &PgPool, config: &File, topic: &str, last: Process, traders: Traders) {
    let ledger = traders.finish().await;
    eventually("the end of every order and an empty outbox", async || {
        let open =
            "SELECT (SELECT count(*) FROM loms.unpaid_order) + (SELECT count(*) FROM loms.outbox)";
        oracle::count(pool, open).await == 0
    })
    .await;
    let ended: ExitStatus = last.stop().await;
    assert!(ended.success(), "{ended:?}");
    ledger.assert_kept(pool).await;
    oracle::recount(pool, topic).await;
    let audit = process::run(config, &["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
    no_deadlocks(pool).await;
}

#[tokio::test]
async fn killed_at_moments_of_chance() {
    let pool = crate::database().await;
    let (config, topic) = prepare(&pool).await;
    let (seed, mut process) = (seed(), Process::start(&config).await);
    let mut chance = StdRng::seed_from_u64(seed);
    let traders = Traders::start(seed, process.client());
    for _ in 0..3 * scale() {
        let answers = || traders.ledger.answers.load(Ordering::Relaxed);
        let enough = answers() + chance.random_range(1..200);
        eventually("answers", async || answers() >= enough).await;
        // any moment between one answer and the next
        tokio::time::sleep(Duration::from_micros(chance.random_range(0..20_000))).await;
        process.kill().await;
        process = Process::start(&config).await;
        traders.reconnect(process.client());
    }
    finish(&pool, &config, &topic, process, traders).await;
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn aborted_at_each_crash_point() {
    let pool = crate::database().await;
    use std::os::unix::process::ExitStatusExt as _;

    const SIGABRT: i32 = 6;
    let (config, topic) = prepare(&pool).await;
    let seed = seed();
    let mut chance = StdRng::seed_from_u64(seed);
    let mut traders: Option<Traders> = None;
    for point in (0..scale()).flat_map(|_| loms::CrashPoint::ALL) {
        // not at the first chance: in the middle of the load
        let strikes = format!("{}={}*off->return", point.name(), chance.random_range(1..4));
        let mut process = Process::start_with(&config, &strikes).await;
        match &traders {
            Some(traders) => traders.reconnect(process.client()),
            None => traders = Some(Traders::start(seed, process.client())),
        }
        let ended = process.ended().await;
        assert_eq!(ended.signal(), Some(SIGABRT), "{point:?}: {ended:?}");
        // the next one would wait until it has lapsed: seconds, each time
        oracle::run(&pool, "UPDATE loms.relay SET leased_until = 'epoch'").await;
    }
    let (last, traders) = (Process::start(&config).await, traders.expect("some"));
    traders.reconnect(last.client());
    finish(&pool, &config, &topic, last, traders).await;
}
