//! The service as a process that is killed in the middle of a purchase: before LOMS has the order, and after.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use proto::cart::{AddToCartRequest, ListCartRequest};
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::Code;

use crate::{
    loms_stub::{LomsStub, Mood},
    test_app::{
        Neighbours, assert_consistent, config, connect, count_open, eventually, purchase_request,
    },
};

/// A running service; killed, not stopped.
struct Process {
    child: Child,
    grpc: SocketAddr,
}

impl Process {
    fn start(config: &Value) -> Self {
        Self::start_with(config, "")
    }

    /// `crash_points` as the crate `fail` reads them; without its feature nothing does.
    fn start_with(config: &Value, crash_points: &str) -> Self {
        let database = config["postgres"]["connection_string"].as_str().unwrap();
        let (_, database) = database.rsplit_once('/').unwrap();
        let path = std::env::temp_dir().join(format!("{database}-{}.yaml", std::process::id()));
        // JSON is YAML
        std::fs::write(&path, config.to_string()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_checkout"))
            .args(["serve", "--stop-on-stdin-close", "--config"])
            .arg(&path)
            .env("FAILPOINTS", crash_points)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let announced: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        std::fs::remove_file(path).unwrap();
        Self {
            child,
            grpc: announced["grpc"].as_str().unwrap().parse().unwrap(),
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn killed_while_loms_holds(pool: PgPool, mood: Mood) {
    let Neighbours {
        loms,
        addresses,
        serving: _serving,
        ..
    } = Neighbours::start().await;
    let config = config(
        &pool,
        addresses,
        &json!({"purchases": {"resume_after": "500ms"}}),
    );
    let mut process = Process::start(&config);
    let mut client = connect(process.grpc).await;
    loms.stock(5, 10);
    client
        .add_to_cart(AddToCartRequest {
            user: 1,
            sku: 5,
            count: 2,
        })
        .await
        .unwrap();
    loms.mood(mood);
    let (broken, ()) = tokio::join!(client.purchase(purchase_request(1, "")), async {
        loms.held().await;
        process.kill();
    });
    assert!(broken.is_err());
    assert_eq!(count_open(&pool).await, 1);
    loms.release();

    finished_by_the_next_process(&pool, &loms, &config).await;
}

async fn finished_by_the_next_process(pool: &PgPool, loms: &LomsStub, config: &Value) {
    let after = Process::start(config);
    finished_once(pool, loms).await;
    let mut client = connect(after.grpc).await;
    assert_eq!(
        client
            .purchase(purchase_request(1, ""))
            .await
            .unwrap()
            .into_inner()
            .order_id,
        1
    );
    let again = client.purchase(purchase_request(1, "")).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    let listed = client
        .list_cart(ListCartRequest { user: 1 })
        .await
        .unwrap()
        .into_inner();
    assert!(listed.items.is_empty());
}

async fn finished_once(pool: &PgPool, loms: &LomsStub) {
    eventually("the worker finishes it", async || {
        count_open(pool).await == 0
    })
    .await;
    assert_eq!(loms.orders().len(), 1);
    assert_eq!(loms.on_sale(5), 8);
    assert_consistent(pool, loms).await;
}

#[sqlx::test]
async fn killed_before_loms_has_the_order(pool: PgPool) {
    killed_while_loms_holds(pool, Mood::HoldsBefore).await;
}

#[sqlx::test]
async fn killed_after_loms_has_the_order(pool: PgPool) {
    killed_while_loms_holds(pool, Mood::HoldsAfter).await;
}

#[cfg(feature = "failpoints")]
#[sqlx::test]
async fn aborted_at_each_crash_point(pool: PgPool) {
    let Neighbours {
        loms,
        addresses,
        serving: _serving,
        ..
    } = Neighbours::start().await;
    let config = config(
        &pool,
        addresses,
        &json!({"purchases": {"resume_after": "500ms"}}),
    );
    loms.stock(5, 100);
    for (done, point) in ["purchase-begun", "order-placed", "purchase-closing"]
        .iter()
        .enumerate()
    {
        let process = Process::start_with(&config, &format!("{point}=return"));
        let mut client = connect(process.grpc).await;
        let add = AddToCartRequest {
            user: 1,
            sku: 5,
            count: 2,
        };
        client.add_to_cart(add).await.unwrap();
        let broken = client.purchase(purchase_request(1, point)).await;
        assert!(broken.is_err(), "{point}");
        assert_eq!(count_open(&pool).await, 1, "{point}");
        drop(process);

        let after = Process::start(&config);
        eventually("the worker finishes it", async || {
            count_open(&pool).await == 0
        })
        .await;
        assert_eq!(loms.orders().len(), done + 1, "{point}");
        let mut client = connect(after.grpc).await;
        let told = client.purchase(purchase_request(1, point)).await.unwrap();
        assert_eq!(told.into_inner().order_id, i64::try_from(done).unwrap() + 1);
        assert_consistent(&pool, &loms).await;
    }
}
