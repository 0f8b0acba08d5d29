//! The unpaid order: cancelled by LOMS at its deadline, by the database's clock.

use std::time::Duration;

use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    oracle::{self, rows},
    test_app::{TestApp, eventually, instant},
};

#[tokio::test]
async fn an_unpaid_order_is_cancelled_within_a_second_of_its_deadline() {
    let pool = crate::database().await;
    let timeout = Duration::from_millis(800);
    let app = TestApp::start(
        &pool,
        json!({"orders": {"payment_timeout": "800ms", "expiry_batch": 2}}),
    )
    .await;
    app.receive("d1", &[(1, 7, 5), (2, 7, 5)]).await.unwrap();
    // more than one sweep takes
    let mut orders = Vec::new();
    for _ in 0..5 {
        orders.push(app.create(1, &[(7, 2)]).await.order_id);
    }
    let payed = orders[4];
    app.pay(payed).await.unwrap();
    eventually("nothing waits", async || {
        oracle::count(&pool, "SELECT count(*) FROM loms.unpaid_order").await == 0
    })
    .await;
    for id in &orders[..4] {
        let order = app.list(*id).await;
        assert_eq!(order.status, "cancelled");
        assert_eq!(order.history[2].actor, "timeout");
        let at = |step: usize| instant(order.history[step].at);
        let took = at(2).duration_since(at(1)).unwrap();
        assert!(
            took >= timeout && took < timeout + Duration::from_secs(1),
            "{took:?}"
        );
        let (pay, cancel) = (app.pay(*id).await, app.cancel(*id).await);
        assert_eq!(pay.unwrap_err().code(), Code::FailedPrecondition);
        cancel.unwrap();
    }
    assert_eq!(app.list(payed).await.status, "payed");
    let on_sale: u64 = app.stocks(7).await.iter().map(|(_, units)| units).sum();
    assert_eq!(on_sale, 8);
    app.finish().await;
}

#[tokio::test]
async fn payment_after_the_deadline_is_refused_before_the_sweeper_comes() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 2)]).await.unwrap();
    // whatever it tries, it gets nowhere
    let bar = "CREATE FUNCTION public.bar() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN RAISE EXCEPTION 'no sweeper'; END $$;
               CREATE TRIGGER bar BEFORE INSERT ON loms.status_change
               FOR EACH ROW WHEN (NEW.actor = 'timeout') EXECUTE FUNCTION public.bar()";
    oracle::run(&pool, bar).await;
    let late = app.create(1, &[(7, 1)]).await.order_id;
    let cancelled = app.create(1, &[(7, 1)]).await.order_id;
    oracle::run(
        &pool,
        "UPDATE loms.unpaid_order SET payment_deadline = now() - interval '1 second'",
    )
    .await;
    let refused = app.pay(late).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let failure = refused
        .get_details_precondition_failure()
        .expect("PreconditionFailure");
    let violation = &failure.violations[0];
    assert_eq!(violation.r#type, "PAYMENT_DEADLINE");
    assert_eq!(violation.subject, format!("orders/{late}"));
    assert!(
        violation.description.contains("awaiting payment"),
        "{violation:?}"
    );
    let answer = app
        .post("/orderPayed", json!({"orderID": late}).to_string())
        .await;
    assert_eq!((answer.status, &answer.json()["code"]), (400, &json!(9)));
    // refused and nothing else: the order still holds its unit
    assert_eq!(app.list(late).await.status, "awaiting payment");
    assert_eq!(
        oracle::count(&pool, "SELECT count(*) FROM loms.reservation_stock").await,
        2
    );
    app.cancel(cancelled).await.unwrap();

    // a deadline outlives the process; whoever starts next sweeps
    let next = app.replica().await;
    app.stop().await.unwrap();
    oracle::run(&pool, "DROP TRIGGER bar ON loms.status_change").await;
    eventually("the next sweeper", async || {
        next.list(late).await.status == "cancelled"
    })
    .await;
    let actors: Vec<(String,)> = rows(
        &pool,
        "SELECT actor FROM loms.status_change WHERE sequence = 3 ORDER BY order_id",
    )
    .await;
    assert_eq!(actors, [("timeout".to_owned(),), ("user".to_owned(),)]);
    next.finish().await;
}

#[tokio::test]
async fn many_sweepers_cancel_each_order_once() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let replicas = [app.replica().await, app.replica().await];
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    for _ in 0..100 {
        app.create(1, &[(7, 1)]).await;
    }
    // one that somebody is busy with keeps nobody waiting
    let mut held = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM loms.user_order ORDER BY id LIMIT 1 FOR UPDATE")
        .execute(&mut *held)
        .await
        .unwrap();
    oracle::run(
        &pool,
        "UPDATE loms.unpaid_order SET payment_deadline = now()",
    )
    .await;
    let unpaid = "SELECT count(*) FROM loms.unpaid_order";
    eventually("all but the held one", async || {
        oracle::count(&pool, unpaid).await == 1
    })
    .await;
    held.rollback().await.unwrap();
    eventually("the held one", async || {
        oracle::count(&pool, unpaid).await == 0
    })
    .await;
    assert_eq!(app.stocks(7).await, [(1, 100)]);
    for replica in replicas {
        replica.stop().await.unwrap();
    }
    app.finish().await;
}
