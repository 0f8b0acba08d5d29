//! Everybody at once: the last unit, goods in opposite orders, and three ends of one order.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use serde_json::json;
use sqlx::{PgPool, types::time::OffsetDateTime};
use tokio::{sync::Barrier, task::JoinSet};
use tonic::{Code, Status};

use crate::{
    oracle::{self, no_deadlocks, rows},
    test_app::{TestApp, eventually, lock_waiters},
};

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn the_last_unit_is_sold_once(pool: PgPool) {
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    app.receive("d1", &[(1, 7, 7), (2, 7, 7), (3, 7, 6)])
        .await
        .unwrap();
    let calls = (0..60).map(|n| {
        let app = if n % 2 == 0 { &app } else { &replica };
        app.create(1 + n, &[(7, 1)])
    });
    let answers = join_all(calls).await;
    let of = |status: &str| {
        answers
            .iter()
            .filter(|answer| answer.status == status)
            .count()
    };
    assert_eq!((of("awaiting payment"), of("failed")), (20, 40));
    for failed in answers.iter().filter(|answer| answer.status == "failed") {
        let [short] = &failed.shortages[..] else {
            panic!("{failed:?}")
        };
        assert_eq!((short.sku, short.requested, short.available), (7, 1, 0));
    }
    assert_eq!(app.stocks(7).await, []);
    let reserved = "SELECT sum(count)::bigint FROM loms.reservation_stock";
    assert_eq!(oracle::count(&pool, reserved).await, 20);
    replica.stop().await.unwrap();
    app.finish().await;
}

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn goods_in_opposite_orders_neither_deadlock_nor_oversell(pool: PgPool) {
    const SKUS: u32 = 12;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    let forth: Vec<(u32, u32)> = (1..=SKUS).map(|sku| (sku, 1)).collect();
    let back: Vec<(u32, u32)> = forth.iter().rev().copied().collect();
    // too little for everybody, in two warehouses, and delivered from the wrong end
    let shelves = |units| {
        (1..=SKUS)
            .rev()
            .flat_map(move |sku| [(2, sku, units), (1, sku, units)])
    };
    app.receive("d1", &shelves(4).collect::<Vec<_>>())
        .await
        .unwrap();
    let callers = (0..24).map(async |n| {
        let (app, items) = if n % 2 == 0 {
            (&app, &forth)
        } else {
            (&replica, &back)
        };
        let mut placed = 0;
        for round in 0..6 {
            let created = app.create(1 + n, items).await;
            if created.status == "awaiting payment" {
                placed += 1;
                match (n + round) % 4 {
                    0 => app.pay(created.order_id).await.unwrap(),
                    _ => app.cancel(created.order_id).await.unwrap(),
                }
            } else {
                let more: Vec<_> = shelves(1).collect();
                app.receive(&format!("more-{n}-{round}"), &more)
                    .await
                    .unwrap();
            }
        }
        placed
    });
    let placed: usize = join_all(callers).await.into_iter().sum();
    assert!(placed > 24, "{placed}");
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

/// Whoever asks is told what is true: success only if the order ended that way.
fn fits(status: &str, pay: &Result<(), Status>, cancel: &Result<(), Status>) -> bool {
    let refused = |answer: &Result<(), Status>| {
        answer
            .as_ref()
            .is_err_and(|status| status.code() == Code::FailedPrecondition)
    };
    match status {
        "payed" => pay.is_ok() && refused(cancel),
        "cancelled" => refused(pay) && cancel.is_ok(),
        _ => false,
    }
}

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn of_pay_cancel_and_expire_exactly_one_wins(pool: PgPool) {
    const ORDERS: usize = 50;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, ORDERS as u64)]).await.unwrap();
    let created = join_all((0..ORDERS).map(|_| app.create(1, &[(7, 1)]))).await;
    // the deadlines fall one after another into the time of the calls
    let soon = "UPDATE loms.unpaid_order
                SET payment_deadline = clock_timestamp() + make_interval(secs => 0.15 + order_id % 50 * 0.002)";
    assert_eq!(oracle::run(&pool, soon).await, ORDERS as u64);
    let (barrier, mut calls) = (Arc::new(Barrier::new(2 * ORDERS)), JoinSet::new());
    let (app, mut answers) = (Arc::new(app), Vec::new());
    for order in created {
        let (app, barrier) = (app.clone(), barrier.clone());
        calls.spawn(async move {
            let id = order.order_id;
            let pay = async {
                barrier.wait().await;
                app.pay(id).await
            };
            let cancel = async {
                barrier.wait().await;
                app.cancel(id).await
            };
            let (pay, cancel) = tokio::join!(pay, cancel);
            (id, pay, cancel)
        });
    }
    while let Some(answer) = calls.join_next().await {
        answers.push(answer.unwrap());
    }
    for (id, pay, cancel) in &answers {
        let status = app.list(*id).await.status;
        assert!(
            fits(&status, pay, cancel),
            "{id} is {status}: {pay:?} {cancel:?}"
        );
    }
    let ends = "SELECT count(*) FROM loms.status_change WHERE sequence = 3";
    assert_eq!(oracle::count(&pool, ends).await, ORDERS as i64);
    Arc::into_inner(app)
        .expect("the last handle")
        .finish()
        .await;
    no_deadlocks(&pool).await;
}

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn payment_and_expiry_meet_at_the_deadline(pool: PgPool) {
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 60)]).await.unwrap();
    let created = join_all((0..60).map(|_| app.create(1, &[(7, 1)]))).await;
    let soon =
        "UPDATE loms.unpaid_order SET payment_deadline = clock_timestamp() + interval '500 ms'";
    oracle::run(&pool, soon).await;
    let ends = join_all(created.iter().enumerate().map(async |(n, order)| {
        // spread around the deadline, so that some come before it and some after
        tokio::time::sleep(Duration::from_millis(12 * n as u64)).await;
        app.pay(order.order_id).await
    }))
    .await;
    eventually("no order that waits", async || {
        oracle::count(&pool, "SELECT count(*) FROM loms.unpaid_order").await == 0
    })
    .await;
    for (order, payed) in created.iter().zip(&ends) {
        let order = app.list(order.order_id).await;
        let expected = if payed.is_ok() {
            ("payed", "user")
        } else {
            ("cancelled", "timeout")
        };
        assert_eq!(
            (order.status.as_str(), order.history[2].actor.as_str()),
            expected
        );
        let code = payed
            .as_ref()
            .map_or_else(Status::code, |()| Code::FailedPrecondition);
        assert_eq!(code, Code::FailedPrecondition);
    }
    assert!(ends.iter().any(Result::is_ok) && ends.iter().any(Result::is_err));
    app.finish().await;
}

#[sqlx::test(migrator = "loms::MIGRATOR")]
async fn a_caller_who_leaves_does_not_cut_a_payment_in_half(pool: PgPool) {
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    let (payed, cancelled) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    let mut held = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.user_order FOR UPDATE")
        .execute(&mut *held)
        .await
        .unwrap();
    tokio::select! {
        _ = app.pay(payed) => panic!("the order is locked"),
        _ = app.post("/cancelOrder", json!({"orderID": cancelled}).to_string()) => panic!("the order is locked"),
        () = lock_waiters(&pool, 2) => {}
    }
    // both callers are gone; an answer on the same connection shows that the server has noticed
    app.stocks(7).await;
    let released: OffsetDateTime = sqlx::query_scalar("SELECT clock_timestamp()")
        .fetch_one(&mut *held)
        .await
        .unwrap();
    held.rollback().await.unwrap();
    eventually("both ends", async || {
        let statuses: Vec<(String,)> = rows(
            &pool,
            "SELECT status::text FROM loms.user_order ORDER BY id",
        )
        .await;
        statuses == [("payed".to_owned(),), ("cancelled".to_owned(),)]
    })
    .await;
    let times: Vec<(OffsetDateTime,)> = rows(
        &pool,
        "SELECT at FROM loms.status_change WHERE sequence = 3",
    )
    .await;
    // the history says when it happened, not when somebody began to wait for it
    assert!(times.iter().all(|(at,)| *at >= released), "{times:?}");
    app.finish().await;
}
