//! A load as a person runs it, to see that it comes to its figures. `.ci/run` runs all of them, one after the other: beside
//! other tests they would take the machine from those that have deadlines.

use std::time::Duration;

use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crate::test_stack::{DEVSTACK, binaries};

/// A start, a second of load, an audit, on a busy machine.
const BOUND: Duration = Duration::from_secs(120);

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
