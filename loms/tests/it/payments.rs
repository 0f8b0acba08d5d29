//! Payments that come together share a transaction, and each gets its own answer.

use futures::future::join_all;
use tonic::Code;

use crate::{
    oracle,
    test_app::{TestApp, arrived, eventually, lock_waiters, sit_on},
};

#[tokio::test]
async fn each_of_a_batch_gets_its_own_answer() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, serde_json::json!({})).await;
    app.receive("d1", &[(1, 7, 100), (1, 8, 1)]).await.unwrap();
    let mut orders = Vec::new();
    for user in 1..=9 {
        orders.push(app.create(user, &[(7, 2)]).await.order_id);
    }
    let (first, good) = (orders[0], &orders[1..7]);
    let (payed, cancelled) = (orders[7], orders[8]);
    let late = app.create(10, &[(8, 1)]).await.order_id;
    let failed = app.create(11, &[(7, 1000)]).await.order_id;
    app.pay(payed).await.unwrap();
    app.cancel(cancelled).await.unwrap();

    // a first payment waits for its deadline, which is held; what comes meanwhile is the next batch
    let held = sit_on(
        &pool,
        &format!("loms.unpaid_order WHERE order_id = {first}"),
    )
    .await;
    let waits = app.pay(first);
    let meanwhile = async {
        lock_waiters(&pool, 1).await;
        // due, and the sweeper, which would put its unit back, cannot have it: a payment has to notice by itself
        let sweeper = sit_on(&pool, "loms.stock WHERE sku = 8").await;
        let due = "UPDATE loms.unpaid_order SET payment_deadline = now() WHERE order_id = $1";
        sqlx::query(due).bind(late).execute(&pool).await.unwrap();
        let asked = good
            .iter()
            .copied()
            .chain([good[0], payed, late, cancelled, failed, 1_000_000]);
        let answers = join_all(asked.map(|order| app.pay(order)));
        let release = async {
            arrived(&app).await;
            held.rollback().await.unwrap();
        };
        let (answers, ()) = tokio::join!(answers, release);
        sweeper.rollback().await.unwrap();
        answers
    };
    let (waited, answers) = tokio::join!(waits, meanwhile);
    waited.unwrap();
    let codes: Vec<Code> = answers
        .iter()
        .map(|answer| {
            answer
                .as_ref()
                .err()
                .map_or(Code::Ok, |refused| refused.code())
        })
        .collect();
    let (well, rest) = codes.split_at(8);
    assert_eq!(
        well,
        [Code::Ok; 8],
        "six, one of them again, and one payed long ago"
    );
    let illegal = Code::FailedPrecondition;
    assert_eq!(rest, [illegal, illegal, illegal, Code::NotFound]);
    let past = answers[8].as_ref().unwrap_err().message();
    assert!(past.contains("deadline"), "{past}");

    let sold = "SELECT sum(count)::bigint FROM loms.write_off";
    assert_eq!(oracle::count(&pool, sold).await, 8 * 2);
    let changes = "SELECT count(*) FROM loms.status_change WHERE to_status = 'payed'";
    assert_eq!(oracle::count(&pool, changes).await, 8);
    eventually("the late one is swept", async || {
        app.list(late).await.status == "cancelled"
    })
    .await;
    app.finish().await;
}
