//! Everybody at once: the last unit, goods in opposite orders, and three ends of one order.

use std::{collections::BTreeMap, time::Duration};

use futures::future::join_all;
use serde_json::json;
use sqlx::{PgPool, types::time::OffsetDateTime};
use tokio::sync::Barrier;
use tonic::{Code, Status};

use crate::{
    oracle::{self, no_deadlocks, rows},
    test_app::{Lure, TestApp, arrived, eventually, lock_waiters, scale, sit_on},
};

#[tokio::test]
async fn the_last_unit_is_sold_once() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    for sku in 1..=scale() as u32 {
        let delivery = [(1, sku, 40), (2, sku, 35), (3, sku, 25)];
        app.receive(&format!("d{sku}"), &delivery).await.unwrap();
        // both placers are stopped at the shelf with their first order; everybody else is there when they may go on
        let held = sit_on(&pool, "loms.stock").await;
        let calls = join_all((0..200).map(async |n| {
            let app = if n % 2 == 0 { &app } else { &replica };
            app.create(1 + n, &[(sku, 1)]).await
        }));
        let release = async {
            lock_waiters(&pool, 2).await;
            tokio::join!(arrived(&app), arrived(&replica));
            held.rollback().await.unwrap();
        };
        let (answers, ()) = tokio::join!(calls, release);
        let of = |status: &str| {
            answers
                .iter()
                .filter(|answer| answer.status == status)
                .count()
        };
        assert_eq!((of("awaiting payment"), of("failed")), (100, 100));
        for failed in answers.iter().filter(|answer| answer.status == "failed") {
            let [short] = &failed.shortages[..] else {
                panic!("{failed:?}")
            };
            assert_eq!((short.sku, short.requested, short.available), (sku, 1, 0));
        }
        assert_eq!(app.stocks(sku).await, []);
        let reserved: Vec<(i64, i64)> = sqlx::query_as(
            "SELECT warehouse_id, sum(count)::bigint FROM loms.reservation_stock
             WHERE sku = $1 GROUP BY warehouse_id ORDER BY warehouse_id",
        )
        .bind(i64::from(sku))
        .fetch_all(&pool)
        .await
        .unwrap();
        assert_eq!(reserved, [(1, 40), (2, 35), (3, 25)]);
    }
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn goods_in_opposite_orders_neither_deadlock_nor_oversell() {
    let pool = crate::database().await;
    const SKUS: u32 = 12;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    let rounds = 6 * scale();
    // two units of everything, written forth, back, and with each SKU on two lines
    let forth: Vec<(u32, u32)> = (1..=SKUS).map(|sku| (sku, 2)).collect();
    let back: Vec<(u32, u32)> = forth.iter().rev().copied().collect();
    let both: Vec<(u32, u32)> = forth
        .iter()
        .chain(&back)
        .map(|&(sku, _)| (sku, 1))
        .collect();
    let baskets = [&forth, &back, &both];
    // too little for everybody, in two warehouses, and delivered from the wrong end
    let shelves = |units| {
        (1..=SKUS)
            .rev()
            .flat_map(move |sku| [(2, sku, units), (1, sku, units)])
    };
    app.receive("d1", &shelves(4).collect::<Vec<_>>())
        .await
        .unwrap();
    let callers = (0..30).map(async |n: usize| {
        let (app, user) = (
            if n.is_multiple_of(2) { &app } else { &replica },
            1 + n as i64,
        );
        let mut placed = 0;
        for round in 0..rounds {
            let created = app.create(user, baskets[(n + round) % 3]).await;
            if created.status == "awaiting payment" {
                placed += 1;
                let order = app.list(created.order_id).await;
                assert!(
                    order
                        .items
                        .iter()
                        .map(|item| (item.sku, item.count))
                        .eq(forth.iter().copied())
                );
                match (n + round) % 4 {
                    0 => app.pay(created.order_id).await.unwrap(),
                    _ => app.cancel(created.order_id).await.unwrap(),
                }
            } else {
                assert_eq!(created.status, "failed");
                assert!(created.shortages.iter().all(|short| short.requested == 2));
                let more: Vec<_> = shelves(1).collect();
                app.receive(&format!("more-{n}-{round}"), &more)
                    .await
                    .unwrap();
            }
        }
        placed
    });
    let placed: usize = join_all(callers).await.into_iter().sum();
    assert!(placed > 5 * rounds, "{placed}");
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

/// An order, and what became of its payment and its cancellation.
type Contest = (i64, Result<(), Status>, Result<(), Status>);

/// Pay and cancel of each order at the same moment, through two processes, while their deadlines pass one after another.
async fn contest(pool: &PgPool, app: &TestApp, replica: &TestApp, orders: &[i64]) -> Vec<Contest> {
    let soon = "UPDATE loms.unpaid_order
                SET payment_deadline = clock_timestamp() + order_id * 7 % 50 * interval '4 ms'
                WHERE order_id = ANY($1)";
    sqlx::query(soon).bind(orders).execute(pool).await.unwrap();
    let barrier = Barrier::new(2 * orders.len());
    let contests = orders.iter().enumerate().map(async |(n, &id)| {
        let (app, replica) = if n % 2 == 0 {
            (app, replica)
        } else {
            (replica, app)
        };
        let pay = async {
            barrier.wait().await;
            app.pay(id).await
        };
        let cancel = async {
            barrier.wait().await;
            replica.cancel(id).await
        };
        let (pay, cancel) = tokio::join!(pay, cancel);
        (id, pay, cancel)
    });
    join_all(contests).await
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

#[tokio::test]
async fn of_pay_cancel_and_expire_exactly_one_wins() {
    let pool = crate::database().await;
    const ROUND: i64 = 50;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    app.receive("lure", &[(1, 7, 1)]).await.unwrap();
    let lure = Lure::set(&app).await;
    let mut ways: BTreeMap<(String, String), usize> = BTreeMap::new();
    for round in 0..20 * scale() {
        app.receive(&format!("d{round}"), &[(1, 7, 20), (2, 7, 30)])
            .await
            .unwrap();
        let created = join_all((0..ROUND).map(|n| app.create(1 + n, &[(7, 1)]))).await;
        let orders: Vec<_> = created.iter().map(|order| order.order_id).collect();
        let told = contest(&pool, &app, &replica, &orders).await;
        let ends: Vec<(i64, String, String)> = sqlx::query_as(
            "SELECT o.id, o.status::text, h.actor FROM loms.user_order o
             JOIN loms.status_change h ON h.order_id = o.id AND h.sequence = 3
             WHERE o.id = ANY($1) ORDER BY o.id",
        )
        .bind(&orders)
        .fetch_all(&pool)
        .await
        .unwrap();
        assert_eq!(ends.len(), orders.len(), "each has ended, and once");
        for (id, pay, cancel) in &told {
            let (_, status, _) = ends.iter().find(|end| end.0 == *id).expect("an end");
            assert!(
                fits(status, pay, cancel),
                "{id} is {status}: {pay:?} {cancel:?}"
            );
        }
        for (_, status, actor) in ends {
            *ways.entry((status, actor)).or_default() += 1;
        }
    }
    println!("{ways:?}");
    assert_eq!(ways.len(), 3, "{ways:?}");
    lure.let_go(&app).await;
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn payment_and_expiry_meet_at_the_deadline() {
    let pool = crate::database().await;
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

#[tokio::test]
async fn a_caller_who_leaves_does_not_cut_a_payment_in_half() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    let (payed, cancelled) = (
        app.create(1, &[(7, 1)]).await.order_id,
        app.create(1, &[(7, 1)]).await.order_id,
    );
    let mut held = sit_on(&pool, "loms.user_order").await;
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
