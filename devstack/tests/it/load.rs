//! The loads as a person runs them: small ones, to see that each comes to its end and to its figures.

use std::time::Duration;

use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crate::test_stack::{DEVSTACK, binaries};

/// A start, seconds of load, an audit.
const BOUND: Duration = Duration::from_secs(300);

/// The report of `devstack load` with these arguments.
async fn report(arguments: &[&str]) -> Value {
    binaries().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("report.json");
    let mut load = Command::new(DEVSTACK);
    load.arg("load").args(arguments);
    load.args(["--clients", "8", "--no-build", "--json"])
        .arg(&file);
    // a server of its own: what is watched, and how, is set for all of a server
    load.env_remove("DATABASE_URL").kill_on_drop(true);
    let output = timeout(BOUND, load.output()).await.unwrap().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

/// The load fails by itself if nothing has run one of the statements.
#[tokio::test]
async fn every_statement_is_seen_with_its_plan() {
    let report = report(&["plans", "--filled", "2000", "--prepared", "200"]).await;
    assert_eq!(report["audit_clean"], true);
    let plans = report["costs"]["plans"].as_array().unwrap();
    let insert = plans
        .iter()
        .find(|cost| cost["name"] == "placement::insert_orders");
    let insert = insert.expect("orders were made");
    assert!(
        insert["pages_in_memory"].as_f64().unwrap() > 10.0,
        "{insert}"
    );
}

#[tokio::test]
async fn statements_are_named_and_counted_under_load() {
    let load = ["create", "--seconds", "1", "--warmup", "0", "--statements"];
    let report = report(&load).await;
    assert_eq!(report["audit_clean"], true);
    let made = report["figures"]["calls"].as_u64().unwrap();
    assert!(made > 0);
    let costs = report["costs"]["load"].as_array().unwrap();
    let insert = costs
        .iter()
        .find(|cost| cost["name"] == "placement::insert_orders");
    let calls = insert.expect("orders were made")["calls"].as_u64().unwrap();
    // eight callers: a batch has eight orders at most
    assert!(calls * 8 >= made, "{calls} batches, {made} orders");
}

#[tokio::test]
async fn every_load_of_loms_runs_on_one_process_and_on_two() {
    let load = [
        "grown",
        "--filled",
        "1000",
        "--prepared",
        "300",
        "--seconds",
        "1",
        "--warmup",
        "0",
        "--replicas",
        "2",
    ];
    let report = report(&load).await;
    assert_eq!(report["audit_clean"], true);
    let measured = report["measured"].as_array().unwrap();
    for replicas in [1, 2] {
        for load in [
            "create",
            "create_hot",
            "pay",
            "list_old",
            "stocks",
            "swept",
            "mixed",
        ] {
            let name = format!("{replicas}_{load}_per_second");
            let found = measured.iter().find(|pair| pair[0] == *name);
            assert!(
                found.is_some_and(|pair| pair[1].as_f64() > Some(0.0)),
                "{name}"
            );
        }
    }
}
