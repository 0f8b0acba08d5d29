//! Idempotency keys: with one a retry gives the same order, whoever else is calling.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    kafka,
    oracle::{self, no_deadlocks},
    process::{self, File, Process},
    test_app::{TestApp, lock_waiters, order},
};

#[tokio::test]
async fn a_replay_answers_with_the_orders_present_status() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 5), (1, 8, 5)]).await.unwrap();
    let first = app
        .try_create(order(1, &[(7, 2), (8, 1)], "a"))
        .await
        .unwrap();
    // the same goods, written differently
    let again = app
        .try_create(order(1, &[(8, 1), (7, 1), (7, 1)], "a"))
        .await
        .unwrap();
    assert_eq!(again, first);
    app.pay(first.order_id).await.unwrap();
    let again = app
        .try_create(order(1, &[(7, 2), (8, 1)], "a"))
        .await
        .unwrap();
    assert_eq!(
        (again.order_id, again.status.as_str()),
        (first.order_id, "payed")
    );

    let failed = app
        .try_create(order(1, &[(7, 9), (9, 1)], "b"))
        .await
        .unwrap();
    assert_eq!(
        (failed.status.as_str(), failed.shortages.len()),
        ("failed", 2)
    );
    app.receive("d2", &[(1, 7, 100), (1, 9, 100)])
        .await
        .unwrap();
    assert_eq!(
        app.try_create(order(1, &[(7, 9), (9, 1)], "b"))
            .await
            .unwrap(),
        failed
    );

    // a key is the user's own, and an empty key is none
    let other = app
        .try_create(order(2, &[(7, 2), (8, 1)], "a"))
        .await
        .unwrap();
    assert_ne!(other.order_id, first.order_id);
    let one = app.create(1, &[(7, 1)]).await.order_id;
    assert_ne!(app.create(1, &[(7, 1)]).await.order_id, one);
    app.finish().await;
}

#[tokio::test]
async fn fifty_calls_with_one_key_over_two_processes_make_one_order() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let config = process::config(&pool, &topic, &json!({}));
    let stock = File::new("warehouse_id,sku,count\n1,7,100\n");
    let received = process::run(&config, &["stock", "receive", stock.path()]).await;
    assert!(received.status.success(), "{received:?}");
    let processes = [Process::start(&config).await, Process::start(&config).await];
    let lines = [processes[0].client(), processes[1].client()];
    for round in 1..=5 {
        let calls = (0..50).map(|n| {
            let mut loms = lines[n % 2].clone();
            // some of them ask for something else under this key
            let units = if n % 5 == 4 { 2 } else { 1 };
            async move {
                (
                    units,
                    loms.create_order(order(round, &[(7, units)], "only")).await,
                )
            }
        });
        let mut made = BTreeSet::new();
        for (units, answer) in join_all(calls).await {
            match answer {
                Ok(placed) => {
                    let placed = placed.into_inner();
                    assert_eq!(placed.status, "awaiting payment");
                    made.insert((placed.order_id, units));
                }
                Err(refused) => {
                    assert_eq!(refused.code(), Code::InvalidArgument);
                    let reason = refused.get_details_error_info().expect("ErrorInfo").reason;
                    assert_eq!(reason, "IDEMPOTENCY_KEY_REUSED");
                }
            }
        }
        // which of the two bodies came first is nobody's promise; all who asked for it have the same order
        assert_eq!(made.len(), 1, "{made:?}");
        let placed = oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await;
        assert_eq!(placed, round);
    }
    for process in processes {
        assert!(process.stop().await.success());
    }
    let audit = process::run(&config, &["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn keys_in_opposite_orders_do_not_deadlock() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    app.receive("d1", &[(1, 7, 1000)]).await.unwrap();
    let call = async |app: &TestApp, n: i64| {
        let placed = app
            .try_create(order(1, &[(7, 1)], &format!("key-{n}")))
            .await;
        placed.unwrap().order_id
    };
    // both placers wait for the stock with an order each, and a batch gathers behind it
    let mut shelf = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.stock FOR UPDATE")
        .execute(&mut *shelf)
        .await
        .unwrap();
    // then both batches are stopped in the middle of their claims by somebody who has a key of theirs
    let mut claim = pool.begin().await.unwrap();
    let middle = "INSERT INTO loms.idempotency_key VALUES (1, 'key-25', '', 1)";
    sqlx::query(middle).execute(&mut *claim).await.unwrap();
    let gather = async {
        lock_waiters(&pool, 2).await;
        let forth = join_all((0..40).map(|n| call(&app, n)));
        let back = join_all((0..40).rev().map(|n| call(&replica, n)));
        let release = async {
            // answered on the same connections after the forty: they are in by now
            for _ in 0..20 {
                app.stocks(7).await;
                replica.stocks(7).await;
            }
            shelf.rollback().await.unwrap();
            lock_waiters(&pool, 2).await;
            claim.rollback().await.unwrap();
        };
        tokio::join!(forth, back, release)
    };
    let first = [(7, 1)];
    let (_, _, (forth, mut back, ())) =
        tokio::join!(app.create(2, &first), replica.create(3, &first), gather);
    back.reverse();
    assert_eq!(forth, back);
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await,
        42
    );
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn what_is_sold_while_a_claim_waits_is_not_sold_again() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let replica = app.replica().await;
    app.receive("d1", &[(1, 7, 1), (2, 7, 1)]).await.unwrap();
    let mut claim = pool.begin().await.unwrap();
    let taken = "INSERT INTO loms.idempotency_key VALUES (1, 'a', '', 1)";
    sqlx::query(taken).execute(&mut *claim).await.unwrap();
    // the statement that claims also reads the stock, and began before the stock was sold
    let sell = async {
        lock_waiters(&pool, 1).await;
        let sold = replica.create(2, &[(7, 2)]).await;
        claim.rollback().await.unwrap();
        sold
    };
    let (late, sold) = tokio::join!(app.try_create(order(1, &[(7, 1)], "a")), sell);
    let late = late.unwrap();
    assert_eq!(sold.status, "awaiting payment");
    assert_eq!(late.status, "failed", "{late:?}");
    assert_eq!(late.shortages[0].available, 0);
    replica.stop().await.unwrap();
    app.finish().await;
    no_deadlocks(&pool).await;
}

#[tokio::test]
async fn one_key_twice_in_a_batch() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 9)]).await.unwrap();
    // the placer waits for this row with its first order, and the rest gathers behind it
    let mut held = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.stock FOR UPDATE")
        .execute(&mut *held)
        .await
        .unwrap();
    let gather = async {
        lock_waiters(&pool, 1).await;
        let second = app.try_create(order(1, &[(7, 2)], "k"));
        let third = app.try_create(order(1, &[(7, 2)], "k"));
        let other_body = app.try_create(order(1, &[(7, 3)], "k"));
        let release = async {
            // answered on the same connection after the three: they are in by now
            for _ in 0..20 {
                app.stocks(7).await;
            }
            held.rollback().await.unwrap();
        };
        tokio::join!(second, third, other_body, release)
    };
    let (_, (second, third, other_body, ())) = tokio::join!(app.create(1, &[(7, 1)]), gather);
    let answers = [second, third, other_body];
    // which of them comes first is nobody's promise: the key is theirs who ask for the same as the first
    let placed: Vec<_> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().ok())
        .collect();
    let refused: Vec<_> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().err())
        .collect();
    assert_eq!(placed.len() + refused.len(), 3);
    assert!(!placed.is_empty() && !refused.is_empty(), "{answers:?}");
    assert!(
        placed
            .iter()
            .all(|answer| answer.order_id == placed[0].order_id)
    );
    for status in refused {
        assert_eq!(status.code(), Code::InvalidArgument);
        let reason = status.get_details_error_info().expect("ErrorInfo").reason;
        assert_eq!(reason, "IDEMPOTENCY_KEY_REUSED");
    }
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.user_order").await,
        2
    );
    app.finish().await;
}
