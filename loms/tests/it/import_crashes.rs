//! An import killed after every slice, and on both sides of every commit: what comes of it is what
//! comes of one that nobody cut; and until it is done nobody serves.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::{Output, Stdio},
};

use serde_json::json;
use sqlx::PgPool;
use tokio::process::Command;

use crate::{
    import::import,
    import_oracle::{assert_same, written},
    import_source::{leave, load},
    oracle,
    process::{self, File, LOMS, run},
    test_app::seed,
};

const SIGABRT: i32 = 6;
const ORDERS: i64 = 300;

/// Imports in slices of 100 orders, cut where `point` is passed for the first time.
async fn cut_at(pool: &PgPool, point: &str) -> Output {
    leave(pool).await;
    let config = config(pool);
    let mut command = Command::new(testkit::process::program(LOMS));
    let arguments = ["import", "--slice", "100", "--config", config.path()];
    command.args(arguments).stdin(Stdio::null());
    command.env("FAILPOINTS", format!("{point}=return"));
    command.output().await.unwrap()
}

fn config(pool: &PgPool) -> File {
    process::config(pool, "orders", &json!({}))
}

async fn assert_nobody_serves(pool: &PgPool) {
    for command in ["serve", "migrate"] {
        let output = run(&config(pool), &[command]).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{error}");
        assert!(error.contains("run `loms import` again"), "{error}");
    }
}

#[tokio::test]
async fn aborted_after_every_slice_an_import_is_the_same() {
    let (whole, cut) = (
        testkit::empty_database("loms").await,
        testkit::empty_database("loms").await,
    );
    let seed = seed();
    for pool in [&whole, &cut] {
        load(pool, seed, ORDERS).await;
    }
    let mut cuts = 0;
    // written and not committed: nothing of it is there, not even that an import has begun
    let ended = cut_at(&cut, "slice-importing").await;
    assert_eq!(ended.status.signal(), Some(SIGABRT), "{ended:?}");
    let begun = "SELECT count(*) FROM loms.import";
    assert_eq!(oracle::count(&cut, begun).await, 0);
    loop {
        let ended = cut_at(&cut, "slice-imported").await;
        if ended.status.success() {
            break;
        }
        assert_eq!(ended.status.signal(), Some(SIGABRT), "{ended:?}");
        cuts += 1;
        let running = "SELECT count(*) FROM loms.import WHERE state = 'running'";
        if oracle::count(&cut, running).await == 0 {
            continue;
        }
        assert_nobody_serves(&cut).await;
        // the number of an order that is not taken over yet is given to no other
        let number = "SELECT last_value FROM loms.user_order_id_seq";
        assert_eq!(oracle::count(&cut, number).await, ORDERS + 100);
        let ended = cut_at(&cut, "slice-importing").await;
        assert_eq!(ended.status.signal(), Some(SIGABRT), "{ended:?}");
    }
    // the first, three of orders, the last
    assert_eq!(cuts, 5);
    let (code, _, error) = import(&whole, &[]).await;
    assert_eq!(code, Some(0), "{error}");
    assert_same(&written(&cut).await, &written(&whole).await);
    let audit = run(&config(&cut), &["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
}

#[tokio::test]
async fn aborted_an_import_of_a_source_that_changed_is_refused() {
    let pool = testkit::empty_database("loms").await;
    for change in [
        "UPDATE public.user_order SET status = 'payed' WHERE id = 1",
        "INSERT INTO public.user_order VALUES (1000, 7, 'new')",
        "UPDATE public.stock SET count = count - 1 WHERE sku = 1 AND warehouse_id = 1",
    ] {
        oracle::run(
            &pool,
            "DROP SCHEMA IF EXISTS loms CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public",
        )
        .await;
        load(&pool, seed(), ORDERS).await;
        for _ in 0..2 {
            let ended = cut_at(&pool, "slice-imported").await;
            assert_eq!(ended.status.signal(), Some(SIGABRT), "{ended:?}");
        }
        oracle::run(&pool, change).await;
        let (code, _, error) = import(&pool, &[]).await;
        assert_eq!(code, Some(64), "{error}");
        assert!(
            error.contains("has changed since the first slice"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
        assert_nobody_serves(&pool).await;
        // what the line advises
        oracle::run(&pool, "DROP SCHEMA loms CASCADE").await;
        let (code, _, error) = import(&pool, &[]).await;
        assert_eq!(code, Some(0), "{error}");
    }
}
