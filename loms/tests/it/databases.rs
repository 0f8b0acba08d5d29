//! Databases that change under a running service: sessions that become read-only, servers that restart or are not there
//! yet, rows that are gone or locked. Each cause has an answer of its own, and nobody has to restart the service.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    oracle,
    proxy::{Proxy, database_behind_proxy},
    test_app::{TestApp, eventually, order, sit_on},
};

async fn run(pool: &PgPool, statement: &str) {
    let statement = sqlx::AssertSqlSafe(statement.to_owned());
    let done = sqlx::raw_sql(statement).execute(pool).await;
    done.unwrap();
}

/// Ends every session of the service, as a restart of the server does.
async fn end_sessions(admin: &PgPool, database: &str) {
    let ours = "pid <> pg_backend_pid() AND application_name LIKE 'loms%'";
    let end = format!(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{database}' AND {ours}"
    );
    run(admin, &end).await;
}

async fn name_of(pool: &PgPool) -> String {
    let (name,): (String,) = oracle::rows(pool, "SELECT current_database()::text")
        .await
        .remove(0);
    name
}

/// One call of each kind, at once; what was refused.
async fn one_of_each(app: &TestApp, unpaid: &[i64; 2]) -> Vec<Status> {
    let (mut stocks, mut list) = (app.grpc.clone(), app.grpc.clone());
    let listed = proto::loms::ListOrderRequest {
        order_id: unpaid[0],
    };
    let delivery = format!("d-{}", unpaid[0]);
    let answers = tokio::join!(
        app.try_create(order(3, &[(7, 1)], "")),
        app.pay(unpaid[0]),
        app.cancel(unpaid[1]),
        stocks.stocks(proto::loms::StocksRequest { sku: 7 }),
        list.list_order(listed),
        app.receive(&delivery, &[(1, 7, 1)]),
    );
    let answers = [
        answers.0.map(drop),
        answers.1,
        answers.2,
        answers.3.map(drop),
        answers.4.map(drop),
        answers.5.map(drop),
    ];
    answers.into_iter().filter_map(Result::err).collect()
}

async fn unpaid(app: &TestApp) -> [i64; 2] {
    [
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(2, &[(7, 1)]).await.order_id,
    ]
}

#[tokio::test]
async fn a_session_that_became_read_only_is_left_and_not_a_fault() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let orders = unpaid(&app).await;
    let (admin, database) = (testkit::admin(&pool).await, name_of(&pool).await);
    let set = format!("ALTER DATABASE {database} SET default_transaction_read_only = on");
    run(&admin, &set).await;
    end_sessions(&admin, &database).await;
    eventually("a report", async || {
        let ready = app.get("/readyz").await;
        ready.status == 503 && ready.json()["database"] == "read-only"
    })
    .await;
    for status in one_of_each(&app, &orders).await {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    let reset = format!("ALTER DATABASE {database} RESET default_transaction_read_only");
    run(&admin, &reset).await;
    let back = Instant::now();
    eventually("readiness", async || app.get("/readyz").await.status == 200).await;
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
    // no session of the read-only time is left in any pool
    for _ in 0..20 {
        assert_eq!(app.create(1, &[(7, 1)]).await.status, "awaiting payment");
        app.stocks(7).await;
    }
    let refused = one_of_each(&app, &orders).await;
    assert!(refused.is_empty(), "{refused:?}");
    app.finish().await;
}

#[tokio::test]
async fn the_first_calls_after_a_restart_of_the_server_are_served() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let (admin, database) = (testkit::admin(&pool).await, name_of(&pool).await);
    for _ in 0..3 {
        let orders = unpaid(&app).await;
        end_sessions(&admin, &database).await;
        let refused = one_of_each(&app, &orders).await;
        assert!(refused.is_empty(), "{refused:?}");
    }
    app.finish().await;
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}

#[tokio::test]
async fn a_lost_row_is_a_fault_and_a_locked_one_is_not() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({"postgres": {"lock_timeout": "200ms"}})).await;
    app.receive("d1", &[(1, 7, 100), (1, 8, 100)])
        .await
        .unwrap();
    let orders = unpaid(&app).await;

    let locked = sit_on(&pool, &format!("loms.user_order WHERE id = {}", orders[0])).await;
    for status in [
        app.cancel(orders[0]).await.unwrap_err(),
        app.pay(orders[0]).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("locked"), "{status:?}");
    }
    locked.rollback().await.unwrap();

    let locked = sit_on(&pool, "loms.stock WHERE sku = 7").await;
    for _ in 0..2 {
        let request = order(1, &[(7, 1)], "");
        let status = app.try_create(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("locked"), "{status:?}");
        assert_eq!(reason(&status), "STOCK_LOCKED");
    }
    locked.rollback().await.unwrap();

    let count = async || {
        let metrics = app.get("/metrics").await.text;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("loms_counter_broken_invariants_total "));
        line.unwrap().parse::<u64>().unwrap()
    };
    let before = count().await;
    let lost = "WITH lost AS (DELETE FROM loms.stock WHERE sku = 7 RETURNING *) SELECT warehouse_id, sku, count FROM lost";
    let lost: Vec<(i64, i64, i64)> = oracle::rows(&pool, lost).await;
    let status = app.cancel(orders[1]).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    assert_eq!(status.message(), "internal error");
    assert!(count().await > before, "not counted");
    let (warehouse, sku, units) = lost[0];
    let put = format!(
        "INSERT INTO loms.stock (warehouse_id, sku, count) VALUES ({warehouse}, {sku}, {units})"
    );
    run(&pool, &put).await;
    app.cancel(orders[1]).await.unwrap();
    app.finish().await;
}

/// An order with a lost row of stock does not stop the expiry of other orders.
#[tokio::test]
async fn an_order_that_cannot_expire_keeps_no_other_from_it() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100), (1, 8, 100)])
        .await
        .unwrap();
    let broken = app.create(1, &[(7, 1)]).await.order_id;
    let whole = [
        app.create(1, &[(8, 1)]).await.order_id,
        app.create(2, &[(8, 2)]).await.order_id,
    ];
    let lost: Vec<(i64, i64, i64)> = oracle::rows(
        &pool,
        "WITH lost AS (DELETE FROM loms.stock WHERE sku = 7 RETURNING *) SELECT warehouse_id, sku, count FROM lost",
    )
    .await;
    run(
        &pool,
        "UPDATE loms.unpaid_order SET payment_deadline = now()",
    )
    .await;
    eventually("the others expire", async || {
        let left = "SELECT count(*) FROM loms.unpaid_order";
        oracle::count(&pool, left).await == 1
    })
    .await;
    for order in whole {
        assert_eq!(app.list(order).await.status, "cancelled");
    }
    assert_eq!(app.list(broken).await.status, "awaiting payment");
    let metrics = app.get("/metrics").await.text;
    let counted = metrics
        .lines()
        .find_map(|line| line.strip_prefix("loms_counter_broken_invariants_total "));
    assert_ne!(counted, Some("0"), "the alert reads it");
    let (warehouse, sku, units) = lost[0];
    run(
        &pool,
        &format!(
            "INSERT INTO loms.stock (warehouse_id, sku, count) VALUES ({warehouse}, {sku}, {units})"
        ),
    )
    .await;
    // what was mended need not be waited for
    app.cancel(broken).await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn a_service_starts_before_its_database() {
    let pool = crate::database().await;
    let (mut database, connection_string) = database_behind_proxy(&pool);
    database.cut().await;
    let settings = json!({"postgres": {"connection_string": connection_string}});
    let app = TestApp::start_unready(&pool, settings).await;
    assert_eq!(app.get("/healthz").await.status, 200);
    eventually("a report", async || {
        app.get("/readyz").await.json()["database"] == "away"
    })
    .await;
    let started = Instant::now();
    let refused = one_of_each(&app, &[1, 2]).await;
    assert_eq!(refused.len(), 6);
    for status in refused {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    assert!(
        started.elapsed() < Duration::from_secs(12),
        "{:?}",
        started.elapsed()
    );
    database.open();
    eventually("readiness", async || app.get("/readyz").await.status == 200).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    app.finish().await;
}

#[tokio::test]
async fn a_database_without_the_schema_is_waited_for_too() {
    let pool = testkit::empty_database("loms").await;
    let app = TestApp::start_unready(&pool, json!({})).await;
    eventually("a report", async || {
        app.get("/readyz").await.json()["database"] == "schema is missing: run migrate"
    })
    .await;
    let status = app.try_create(order(1, &[(7, 1)], "")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let migrated = loms::migrate(&app.config, Duration::ZERO).await;
    migrated.unwrap();
    eventually("readiness", async || app.get("/readyz").await.status == 200).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    app.create(1, &[(7, 1)]).await;
    app.finish().await;
}

/// Callers of a pool whose every connection waits for a lock.
#[tokio::test]
async fn a_full_pool_is_too_much_at_once_and_not_a_database_that_is_away() {
    let pool = crate::database().await;
    let settings: Value = json!({"postgres": {"max_connections": 2, "acquire_timeout": "300ms", "lock_timeout": "2s"}});
    let app = TestApp::start(&pool, settings).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let orders = unpaid(&app).await;
    let locked = sit_on(&pool, "loms.user_order").await;
    let (first, second, third) =
        tokio::join!(app.cancel(orders[0]), app.cancel(orders[1]), async {
            crate::test_app::lock_waiters(&pool, 2).await;
            let mut grpc = app.grpc.clone();
            let asked = grpc.stocks(proto::loms::StocksRequest { sku: 7 }).await;
            // the probe has a connection of its own
            assert_eq!(app.get("/readyz").await.status, 200);
            asked.map(drop).unwrap_err()
        });
    assert_eq!(third.code(), Code::ResourceExhausted, "{third:?}");
    for status in [first.unwrap_err(), second.unwrap_err()] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    locked.rollback().await.unwrap();
    app.finish().await;
}

/// Callers who leave in the middle take no connection with them: after a lock that made hundreds of calls run into their
/// deadlines, everybody is served at once.
#[tokio::test]
async fn callers_who_leave_take_no_connection_with_them() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    app.stocks(7).await;
    let locked = {
        let mut locked = pool.begin().await.unwrap();
        sqlx::query("LOCK TABLE loms.stock IN ACCESS EXCLUSIVE MODE")
            .execute(&mut *locked)
            .await
            .unwrap();
        locked
    };
    let calls = (0..100).map(async |_| {
        let mut request = tonic::Request::new(proto::loms::StocksRequest { sku: 7 });
        request.set_timeout(Duration::from_millis(100));
        app.grpc.clone().stocks(request).await.map(drop)
    });
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(Result::is_err));
    // their connections wait for the lock, which says nothing about the database: readiness looks
    // every second
    let until = Instant::now() + Duration::from_millis(1_500);
    while Instant::now() < until {
        assert_eq!(app.get("/readyz").await.status, 200);
    }
    locked.rollback().await.unwrap();
    let backends = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'loms'";
    // ten, and a quarter more
    assert!(oracle::count(&pool, backends).await <= 10 + 3);
    let served = (0..50).map(async |_| app.stocks(7).await);
    futures::future::join_all(served).await;
    app.finish().await;
}

/// A host that falls silent with all connections, and another that takes its place.
#[tokio::test]
async fn a_second_server_takes_over_within_seconds() {
    let pool = crate::database().await;
    let (database, connection_string): (Proxy, _) = database_behind_proxy(&pool);
    let settings = json!({"postgres": {"connection_string": connection_string, "acquire_timeout": "1s",
                                       "lock_timeout": "1s", "statement_timeout": "2s"}});
    let app = TestApp::start(&pool, settings).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let orders = unpaid(&app).await;
    database.silence();
    let began = Instant::now();
    eventually("each call", async || {
        one_of_each(&app, &orders).await.is_empty()
    })
    .await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    app.finish().await;
}
