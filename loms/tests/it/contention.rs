//! Somebody is in the way: a row that is held, an order that the database refuses, a transaction that it breaks off. Who
//! has nothing to do with it is served.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use futures::future::join_all;
use proto::loms::CreateOrderResponse;
use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};
use tonic::{Code, Status};

use crate::{
    oracle,
    test_app::{TestApp, arrived, eventually, lock_waiters, order, sit_on},
};

/// How long a transaction of these tests waits for a row.
const LOCK_TIMEOUT: Duration = Duration::from_millis(300);

async fn impatient(pool: &PgPool) -> TestApp {
    let postgres = json!({"lock_timeout": format!("{}ms", LOCK_TIMEOUT.as_millis())});
    TestApp::start(pool, json!({"postgres": postgres})).await
}

/// UNAVAILABLE long before the deadline of the call, and nothing of what happened inside.
#[track_caller]
fn given_up(refused: &Status, took: Duration) {
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.message().contains("locked"), "{refused:?}");
    assert!(took < LOCK_TIMEOUT + Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn a_held_row_hurts_only_those_who_want_it() {
    let pool = crate::database().await;
    let app = impatient(&pool).await;
    app.receive("d1", &[(1, 7, 50), (1, 8, 500)]).await.unwrap();
    let (hot, payed, cancelled) = (
        app.create(1, &[(7, 1), (8, 1)]).await.order_id,
        app.create(1, &[(8, 1)]).await.order_id,
        app.create(1, &[(8, 1)]).await.order_id,
    );
    let held = sit_on(&pool, "loms.stock WHERE sku = 7").await;
    let started = Instant::now();
    let stuck = join_all((0..20).map(async |_| {
        let placed = app.try_create(order(1, &[(7, 1), (8, 1)], "")).await;
        (placed.unwrap_err(), started.elapsed())
    }));
    let beside = async {
        lock_waiters(&pool, 1).await;
        // the next batch, and those who have no need of the placer
        let next = join_all((0..20).map(|n| app.create(2 + n, &[(8, 1)])));
        let others = async {
            app.pay(payed).await.unwrap();
            app.cancel(cancelled).await.unwrap();
            assert_eq!(app.list(payed).await.status, "payed");
            app.stocks(7).await;
        };
        tokio::join!(next, others).0
    };
    let (stuck, next) = tokio::join!(stuck, beside);
    for (refused, took) in &stuck {
        given_up(refused, *took);
    }
    assert!(next.iter().all(|order| order.status == "awaiting payment"));
    // to take its units back needs the row, to write them off does not
    let started = Instant::now();
    let refused = app.cancel(hot).await.unwrap_err();
    assert!(started.elapsed() >= LOCK_TIMEOUT, "it was not held");
    given_up(&refused, started.elapsed());
    app.pay(hot).await.unwrap();
    held.rollback().await.unwrap();
    assert_eq!(app.create(1, &[(7, 1)]).await.status, "awaiting payment");
    let orders = "SELECT count(*) FROM loms.user_order";
    assert_eq!(oracle::count(&pool, orders).await, 3 + 20 + 1);
    app.finish().await;
}

#[tokio::test]
async fn a_held_row_does_not_stop_the_sale_of_everything_else() {
    let pool = crate::database().await;
    let app = impatient(&pool).await;
    app.receive("d1", &[(1, 7, 500), (1, 8, 5000)])
        .await
        .unwrap();
    let held = sit_on(&pool, "loms.stock WHERE sku = 7").await;
    let sold = AtomicUsize::new(0);
    // every third wants what is held, and asks again and again: there is no batch without one of them
    let hot = join_all((0..20).map(async |n| {
        let mut refused = 0;
        while sold.load(Ordering::Relaxed) < 400 {
            let wanted = order(1 + n, &[(7, 1), (8, 1)], "");
            let answer = app.try_create(wanted).await.unwrap_err();
            assert_eq!(answer.code(), Code::Unavailable, "{answer:?}");
            refused += 1;
        }
        refused
    }));
    let others = join_all((0..40).map(async |n| {
        for _ in 0..10 {
            let order = app.create(21 + n, &[(8, 1)]).await;
            assert_eq!(order.status, "awaiting payment");
            sold.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let (refused, _) = tokio::join!(hot, others);
    assert!(refused.iter().all(|times| *times > 0), "{refused:?}");
    held.rollback().await.unwrap();
    // nobody has to wait until it is noticed
    assert_eq!(app.create(1, &[(7, 1)]).await.status, "awaiting payment");
    app.finish().await;
}

#[tokio::test]
async fn a_cancellation_holds_stock_only_when_all_else_is_written() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let order = app.create(1, &[(7, 2)]).await.order_id;
    // its history cannot be written
    let mut held = pool.begin().await.unwrap();
    let lock = sqlx::query("LOCK TABLE loms.status_change IN SHARE MODE");
    lock.execute(&mut *held).await.unwrap();
    let beside = async {
        lock_waiters(&pool, 1).await;
        let mut buyer = pool.begin().await.unwrap();
        let wanted = "SELECT FROM loms.stock WHERE sku = 7 FOR NO KEY UPDATE NOWAIT";
        let got = sqlx::query(wanted).execute(&mut *buyer).await;
        assert_eq!(got.expect("nobody has it").rows_affected(), 1);
        buyer.rollback().await.unwrap();
        held.rollback().await.unwrap();
    };
    let (cancelled, ()) = tokio::join!(app.cancel(order), beside);
    cancelled.unwrap();
    assert_eq!(app.stocks(7).await, [(1, 9)]);
    app.finish().await;
}

#[tokio::test]
async fn a_held_order_is_given_up_and_the_others_are_payed() {
    let pool = crate::database().await;
    let app = impatient(&pool).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    let (hot, cold) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    let held = sit_on(&pool, &format!("loms.user_order WHERE id = {hot}")).await;
    let started = Instant::now();
    let stuck = async {
        let refused = app.pay(hot).await.unwrap_err();
        given_up(&refused, started.elapsed());
        let body = json!({"orderID": hot}).to_string();
        let answer = app.post("/orderPayed", body).await;
        assert_eq!((answer.status, &answer.json()["code"]), (503, &json!(14)));
    };
    let beside = async {
        lock_waiters(&pool, 1).await;
        app.pay(cold).await.unwrap();
        assert_eq!(app.list(hot).await.status, "awaiting payment");
    };
    tokio::join!(stuck, beside);
    held.rollback().await.unwrap();
    app.pay(hot).await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn a_held_row_does_not_keep_other_orders_from_expiring() {
    let pool = crate::database().await;
    let app = impatient(&pool).await;
    app.receive("d1", &[(1, 6, 99), (1, 7, 9)]).await.unwrap();
    // the oldest of all, and so the first that a sweep meets; it has locked SKU 6 when it comes to SKU 7
    let hot = app.create(1, &[(6, 1), (7, 1)]).await.order_id;
    let cold = app.create(1, &[(6, 1)]).await.order_id;
    let held = sit_on(&pool, "loms.stock WHERE sku = 7").await;
    let due = "UPDATE loms.unpaid_order SET payment_deadline = now() - interval '1 s' / order_id";
    oracle::run(&pool, due).await;
    eventually("the order that needs nothing that is held", async || {
        app.list(cold).await.status == "cancelled"
    })
    .await;
    // a sweep that waits for the row keeps nobody from what it has locked before
    for _ in 0..20 {
        assert_eq!(app.create(1, &[(6, 1)]).await.status, "awaiting payment");
    }
    assert_eq!(app.list(hot).await.status, "awaiting payment");
    held.rollback().await.unwrap();
    eventually("the order that needs what was held", async || {
        app.list(hot).await.status == "cancelled"
    })
    .await;
    app.finish().await;
}

/// Users 2, 13 and 3 in one batch, which gathers while the placer is stopped with an order of user 1. Users 2 and 3 want
/// SKU 7, user 13 wants SKU 7 and SKU 13; each has the key `k`.
async fn a_batch_of_three(
    app: &TestApp,
    pool: &PgPool,
) -> Vec<Result<CreateOrderResponse, Status>> {
    let held = sit_on(pool, "loms.stock").await;
    let gather = async {
        lock_waiters(pool, 1).await;
        let orders = [
            order(2, &[(7, 1)], "k"),
            order(13, &[(7, 1), (13, 1)], "k"),
            order(3, &[(7, 1)], "k"),
        ];
        let calls = join_all(orders.map(|order| app.try_create(order)));
        let release = async {
            arrived(app).await;
            held.rollback().await.unwrap();
        };
        tokio::join!(calls, release).0
    };
    let (first, answers) = tokio::join!(app.create(1, &[(7, 1)]), gather);
    assert_eq!(first.status, "awaiting payment");
    answers
}

const PLACED: &str = "SELECT count(*) FROM loms.user_order WHERE status = 'awaiting payment'";

#[tokio::test]
async fn an_order_that_the_database_refuses_hurts_only_itself() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9), (1, 13, 9)]).await.unwrap();
    let refuse = "ALTER TABLE loms.order_item ADD CONSTRAINT not_13 CHECK (sku <> 13)";
    oracle::run(&pool, refuse).await;
    let answers = a_batch_of_three(&app, &pool).await;
    let refused = answers[1].as_ref().unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert!(!refused.message().contains("not_13"), "{refused:?}");
    for good in [&answers[0], &answers[2]] {
        assert_eq!(good.as_ref().unwrap().status, "awaiting payment");
    }
    assert_eq!(oracle::count(&pool, PLACED).await, 3);
    // the key of the refused order is free
    oracle::run(&pool, "ALTER TABLE loms.order_item DROP CONSTRAINT not_13").await;
    let other = app.try_create(order(13, &[(7, 2)], "k")).await.unwrap();
    assert_eq!(other.status, "awaiting payment");
    assert_eq!(oracle::count(&pool, PLACED).await, 4);
    app.finish().await;
}

/// PostgreSQL breaks off the transactions that write an order of user 13, as often as it is told; each attempt is counted by
/// a sequence, which no rollback undoes.
async fn break_off(pool: &PgPool, sqlstate: &str, times: u32) {
    let statement = format!(
        "CREATE SEQUENCE public.attempts;
         CREATE FUNCTION public.break_off() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF nextval('public.attempts') <= {times} THEN
                 RAISE EXCEPTION 'broken off' USING ERRCODE = '{sqlstate}';
             END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER break_off BEFORE INSERT ON loms.user_order
         FOR EACH ROW WHEN (NEW.user_id = 13) EXECUTE FUNCTION public.break_off()"
    );
    let created = sqlx::raw_sql(AssertSqlSafe(statement)).execute(pool).await;
    created.expect("a trigger");
}

const ATTEMPTS: &str = "SELECT last_value FROM public.attempts";

async fn is_tried_once_more(pool: &PgPool, sqlstate: &str) {
    let app = TestApp::start(pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9), (1, 13, 9)]).await.unwrap();
    break_off(pool, sqlstate, 1).await;
    let answers = a_batch_of_three(&app, pool).await;
    for answer in &answers {
        assert_eq!(answer.as_ref().unwrap().status, "awaiting payment");
    }
    assert_eq!(oracle::count(pool, ATTEMPTS).await, 2);
    assert_eq!(oracle::count(pool, PLACED).await, 4);
    app.finish().await;
}

#[tokio::test]
async fn a_batch_that_a_deadlock_breaks_off_is_tried_once_more() {
    let pool = crate::database().await;
    is_tried_once_more(&pool, "40P01").await;
}

#[tokio::test]
async fn a_batch_that_cannot_be_serialized_is_tried_once_more() {
    let pool = crate::database().await;
    is_tried_once_more(&pool, "40001").await;
}

#[tokio::test]
async fn a_batch_that_is_broken_off_twice_is_the_callers_to_retry() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9), (1, 13, 9)]).await.unwrap();
    break_off(&pool, "40P01", 2).await;
    let answers = a_batch_of_three(&app, &pool).await;
    for answer in &answers {
        assert_eq!(answer.as_ref().unwrap_err().code(), Code::Unavailable);
    }
    // twice and not once more, and the batch left nothing behind: only the order that came before it
    assert_eq!(oracle::count(&pool, ATTEMPTS).await, 2);
    assert_eq!(oracle::count(&pool, PLACED).await, 1);
    for user in [2, 3] {
        let again = app.try_create(order(user, &[(7, 1)], "k")).await.unwrap();
        assert_eq!(again.status, "awaiting payment");
    }
    let again = app
        .try_create(order(13, &[(7, 1), (13, 1)], "k"))
        .await
        .unwrap();
    assert_eq!(again.status, "awaiting payment");
    assert_eq!(oracle::count(&pool, PLACED).await, 4);
    app.finish().await;
}
