//! The connection to the database, as others may have set it up: whatever `search_path` is, by which PostgreSQL prints the
//! names of types, and encrypted where that is asked for.

use proto::loms::CreateOrderResponse;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

use crate::{
    oracle::{self, rows},
    test_app::{TestApp, eventually, order},
};

/// Every way that an order can go, and all that is said of it.
async fn every_way(pool: &PgPool) {
    let app = TestApp::start(pool, json!({})).await;
    app.receive("d1", &[(1, 7, 10)]).await.unwrap();
    let status = async |order: &CreateOrderResponse| app.list(order.order_id).await.status;

    let cancelled = app.create(1, &[(7, 1)]).await;
    app.cancel(cancelled.order_id).await.unwrap();
    app.cancel(cancelled.order_id).await.unwrap();
    assert_eq!(status(&cancelled).await, "cancelled");

    let payed = app.create(1, &[(7, 1)]).await;
    app.pay(payed.order_id).await.unwrap();
    app.pay(payed.order_id).await.unwrap();
    // these find the order's status by another statement than a payment among others
    assert!(app.cancel(payed.order_id).await.is_err());
    assert!(app.pay(cancelled.order_id).await.is_err());
    assert_eq!(status(&payed).await, "payed");

    let failed = app.create(1, &[(7, 99)]).await;
    assert_eq!(status(&failed).await, "failed");

    let expired = app.try_create(order(1, &[(7, 1)], "k")).await.unwrap();
    oracle::run(
        pool,
        "UPDATE loms.unpaid_order SET payment_deadline = now()",
    )
    .await;
    eventually("the sweeper", async || {
        status(&expired).await == "cancelled"
    })
    .await;
    let replayed = app.try_create(order(1, &[(7, 1)], "k")).await.unwrap();
    assert_eq!(
        (replayed.order_id, replayed.status.as_str()),
        (expired.order_id, "cancelled")
    );
    app.finish().await;
}

/// A database whose sessions begin with another path.
async fn with_path(path: &str) -> PgPool {
    let pool = crate::database().await;
    let name: Vec<(String,)> = rows(&pool, "SELECT current_database()::text").await;
    let set = format!("ALTER DATABASE {} SET search_path = {path}", name[0].0);
    sqlx::raw_sql(AssertSqlSafe(set))
        .execute(&pool)
        .await
        .unwrap();
    pool
}

/// The role `loms` has the schema `loms` in its path by `"$user"`.
#[tokio::test]
async fn orders_go_every_way_as_shipped() {
    let pool = crate::database().await;
    let path: Vec<(String,)> = rows(&pool, "SELECT current_setting('search_path')").await;
    assert_eq!(path[0].0, r#""$user", public"#);
    every_way(&pool).await;
}

#[tokio::test]
async fn orders_go_every_way_without_a_path() {
    every_way(&with_path("''").await).await;
}

#[tokio::test]
async fn orders_go_every_way_with_another_schema_in_the_path() {
    every_way(&with_path("public").await).await;
}

/// Also in a build of this service alone, which has nothing of what devstack switches on in sqlx.
#[tokio::test]
async fn a_server_that_must_encrypt_is_asked_to() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let url = format!("postgres://loms:loms@{address}/loms?sslmode=require");
    let asked = async {
        let (mut client, _) = server.accept().await.unwrap();
        let mut request = [0; 8];
        client.read_exact(&mut request).await.unwrap();
        request
    };
    let request = tokio::select! {
        request = asked => request,
        refused = PgConnection::connect(&url) => panic!("{refused:?}"),
    };
    // SSLRequest of the protocol: its length, and the code that stands for it
    assert_eq!(request, [0, 0, 0, 8, 4, 210, 22, 47]);
}
