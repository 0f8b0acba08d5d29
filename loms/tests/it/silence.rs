//! A database host that stops answering and closes nothing: no error ever comes, and everybody is back within a bound.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use futures::future::join_all;
use proto::loms::{CancelOrderRequest, StocksRequest};
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::{Code, Status};

use crate::{
    oracle::{self, rows},
    process::Process,
    proxy::{Proxy, database_behind_proxy},
    test_app::{TestApp, eventually, lock_waiters, order, sit_on},
};

/// Sessions of the service that are stopped in their tracks; dropped, they go on.
struct Stopped(Vec<i32>);

impl Stopped {
    /// `None`: the server's processes are not ours to signal.
    async fn all(pool: &PgPool) -> Option<Stopped> {
        let (database,): (String,) = rows(pool, "SELECT current_database()::text")
            .await
            .remove(0);
        for _ in 0..100 {
            let sessions: Vec<(i32,)> = rows(
                pool,
                "SELECT pid FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'loms%' ORDER BY pid",
            )
            .await;
            let pids: Vec<i32> = sessions.into_iter().map(|(pid,)| pid).collect();
            assert!(!pids.is_empty(), "nobody to stop");
            // a number means nothing on another machine, or in another namespace
            if !pids.iter().all(|pid| is_backend(*pid, &database)) {
                return None;
            }
            let stopped = Stopped(pids);
            if !stopped.signal("-STOP") {
                return None;
            }
            // who was stopped in the middle of something may hold a lock of the server itself
            let idle: Vec<(i32,)> = rows(
                pool,
                "SELECT pid FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'loms%' AND state = 'idle' ORDER BY pid",
            )
            .await;
            if idle
                .into_iter()
                .map(|(pid,)| pid)
                .eq(stopped.0.iter().copied())
            {
                return Some(stopped);
            }
        }
        panic!("the sessions are never idle");
    }

    fn signal(&self, signal: &str) -> bool {
        let pids = self.0.iter().map(i32::to_string);
        let done = Command::new("kill").arg(signal).args(pids).status();
        done.is_ok_and(|status| status.success())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

fn is_backend(pid: i32, database: &str) -> bool {
    let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let title = String::from_utf8_lossy(&title).into_owned();
    title.starts_with("postgres: ") && title.contains(database)
}

/// How long a caller may have to wait: for a connection, for a transaction that hears nothing, for a last question to the
/// connection; and a busy machine.
const BOUND: Duration = Duration::from_millis(1000 + 1500 + 1000 + 1500);

fn bounds(connection_string: &str) -> Value {
    let postgres = json!({"connection_string": connection_string, "acquire_timeout": "1s",
                          "lock_timeout": "400ms", "statement_timeout": "500ms",
                          // silent ones keep most of the places until then, and forty callers want
                          // theirs at once
                          "reap_after": "2s"});
    // an idle relay is in no transaction; one that was silent in the middle of one is the relay until the server ends it
    let outbox = json!({"poll_interval": "3s", "broker_timeout": "500ms"});
    json!({"postgres": postgres, "outbox": outbox})
}

/// Orders to pay and to cancel, and every connection that the pool may have.
async fn opened(app: &TestApp, pool: &PgPool) -> Vec<i64> {
    app.receive("d1", &[(1, 7, 500)]).await.unwrap();
    let created = join_all((0..40).map(|n| app.create(1 + n, &[(7, 1)]))).await;
    join_all((0..40).map(|_| app.stocks(7))).await;
    eventually("an empty outbox", async || {
        oracle::count(pool, "SELECT count(*) FROM loms.outbox").await == 0
    })
    .await;
    created.iter().map(|order| order.order_id).collect()
}

/// Everything that can be asked, by four times as many callers as there are connections; orders have a key.
async fn everything(app: &TestApp, orders: &[i64]) -> Vec<Result<(), Status>> {
    let calls = orders.iter().enumerate().map(async |(n, &id)| {
        let started = Instant::now();
        let mut grpc = app.grpc.clone();
        let answer = match n % 5 {
            0 => app.pay(id).await,
            1 => app.cancel(id).await,
            2 => grpc
                .stocks(proto::loms::StocksRequest { sku: 7 })
                .await
                .map(drop),
            3 => grpc
                .list_order(proto::loms::ListOrderRequest { order_id: id })
                .await
                .map(drop),
            _ => {
                let keyed = order(1, &[(7, 1)], &format!("key-{id}"));
                app.try_create(keyed).await.map(drop)
            }
        };
        assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
        answer
    });
    join_all(calls).await
}

#[track_caller]
fn refused(answers: &[Result<(), Status>]) -> usize {
    let refused = answers.iter().filter_map(|answer| answer.as_ref().err());
    refused
        .map(|status| {
            // or while every connection waits: too much at once
            let known = [Code::Unavailable, Code::ResourceExhausted];
            assert!(known.contains(&status.code()), "{status:?}");
        })
        .count()
}

/// The relay and the sweeper had connections of their own, as silent as the others.
async fn workers_go_on(pool: &PgPool) {
    eventually("a relay that goes on", async || {
        oracle::count(pool, "SELECT count(*) FROM loms.outbox").await == 0
    })
    .await;
    oracle::run(
        pool,
        "UPDATE loms.unpaid_order SET payment_deadline = now()",
    )
    .await;
    eventually("a sweeper that goes on", async || {
        oracle::count(pool, "SELECT count(*) FROM loms.unpaid_order").await == 0
    })
    .await;
}

async fn nobody_waits_for_the_silent(pool: &PgPool, app: TestApp, orders: &[i64]) {
    // ten connections are silent and the others are waited for; who asks again is served
    let answers = everything(&app, orders).await;
    assert!(refused(&answers) > 0, "nobody has noticed");
    let answers = everything(&app, orders).await;
    assert_eq!(refused(&answers), 0, "{answers:?}");
    workers_go_on(pool).await;
    let keyed = "SELECT count(*) FROM loms.user_order";
    assert_eq!(oracle::count(pool, keyed).await, 40 + 8);
    app.finish().await;
}

#[tokio::test]
async fn a_host_that_falls_silent_holds_nobody() {
    let pool = crate::database().await;
    let (database, connection_string) = database_behind_proxy(&pool);
    let app = TestApp::start(&pool, bounds(&connection_string)).await;
    let orders = opened(&app, &pool).await;
    database.silence();
    nobody_waits_for_the_silent(&pool, app, &orders).await;
}

#[tokio::test]
async fn sessions_that_are_stopped_hold_nobody() {
    let pool = crate::database().await;
    let (database, connection_string) = database_behind_proxy(&pool);
    let app = TestApp::start(&pool, bounds(&connection_string)).await;
    let orders = opened(&app, &pool).await;
    let stopped = Stopped::all(&pool).await;
    if stopped.is_none() {
        println!(
            "the server's processes cannot be signalled from here: its connections fall silent instead"
        );
        database.silence();
    }
    nobody_waits_for_the_silent(&pool, app, &orders).await;
}

#[tokio::test]
async fn a_host_that_is_silent_for_a_while_is_away_and_then_back() {
    let pool = crate::database().await;
    let (database, connection_string): (Proxy, _) = database_behind_proxy(&pool);
    let app = TestApp::start(&pool, bounds(&connection_string)).await;
    let orders = opened(&app, &pool).await;
    // not even a new connection hears anything
    database.silence_all();
    for _ in 0..2 {
        let answers = everything(&app, &orders).await;
        assert_eq!(refused(&answers), answers.len());
        assert_eq!(app.get("/healthz").await.status, 200);
    }
    eventually("a report", async || app.get("/readyz").await.status == 503).await;
    database.speak();
    let back = Instant::now();
    eventually("orders, payments and the rest", async || {
        refused(&everything(&app, &orders).await) == 0
    })
    .await;
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
    workers_go_on(&pool).await;
    app.finish().await;
}

/// Callers who come one after another, and a pool full of connections that rest.
#[tokio::test]
async fn connections_that_rest_are_not_found_silent_one_by_one() {
    let pool = crate::database().await;
    let (database, connection_string): (Proxy, _) = database_behind_proxy(&pool);
    let settings = json!({"postgres": {"connection_string": connection_string, "acquire_timeout": "1s",
                                       "lock_timeout": "1s", "statement_timeout": "2s"}});
    let app = TestApp::start(&pool, settings).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let mut locked = pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE loms.stock IN ACCESS EXCLUSIVE MODE")
        .execute(&mut *locked)
        .await
        .unwrap();
    let at_once = (0..10).map(async |_| app.stocks(7).await);
    let unlock = async {
        crate::test_app::lock_waiters(&pool, 10).await;
        locked.rollback().await.unwrap();
    };
    futures::join!(futures::future::join_all(at_once), unlock);
    database.silence();
    let began = Instant::now();
    while app
        .grpc
        .clone()
        .stocks(proto::loms::StocksRequest { sku: 7 })
        .await
        .is_err()
    {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
    }
    app.finish().await;
}

/// A call that waits for a connection to be made is served by one that comes back before.
#[tokio::test]
async fn a_connection_that_comes_back_serves_a_call_that_waits_for_a_new_one() {
    let pool = crate::database().await;
    let (database, through) = database_behind_proxy(&pool);
    let postgres = json!({"connection_string": through, "acquire_timeout": "10s",
                          "lock_timeout": "10s", "statement_timeout": "20s"});
    let (process, config) = Process::with_stock(&pool, postgres).await;
    let mut loms = process.client();
    // its second connection is not made before there is a second call
    let stocks = async || {
        let mut loms = process.client();
        loms.stocks(StocksRequest { sku: 7 }).await
    };
    eventually("a database", async || stocks().await.is_ok()).await;
    let order = loms.create_order(order(1, &[(7, 1)], "")).await.unwrap();
    let order_id = order.into_inner().order_id;
    let held = sit_on(&pool, "loms.user_order").await;
    let second = async {
        lock_waiters(&pool, 1).await;
        database.silence_new();
        let release = async {
            eventually("a call without a connection", async || {
                process.waiting().await == 1
            })
            .await;
            held.rollback().await.unwrap();
        };
        tokio::join!(stocks(), release).0
    };
    let cancel = loms.cancel_order(CancelOrderRequest { order_id });
    let (cancelled, stocks) = tokio::join!(cancel, second);
    cancelled.unwrap();
    assert_eq!(stocks.unwrap().into_inner().stocks.len(), 1);
    database.speak();
    assert!(process.stop().await.success());
    drop(config);
}
