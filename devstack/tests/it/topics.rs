//! `deployments/kafka/topics.sh` against a stand-in for Kafka's own script: which topics it asks for, that it asks again, and
//! that it gives up.

use std::{fs, os::unix::fs::PermissionsExt as _};

use tokio::process::Command;

use crate::deployments::{Compose, root};

/// Notes what it is asked; fails the first `FAILS` times.
const STAND_IN: &str = r#"#!/usr/bin/env bash
echo "$*" >>"$0.asked"
(($(wc -l <"$0.asked") > FAILS))
"#;

/// Runs the script as its container would: how it ends, what it says of an error, what Kafka is asked.
async fn run(fails: usize) -> (Option<i32>, String, Vec<String>) {
    let compose = Compose::load("docker-compose.yaml");
    let service = compose.service("kafka-topics");
    assert_eq!(service.list("entrypoint"), ["bash", "/topics.sh"]);
    let bin = tempfile::tempdir().unwrap();
    let stand_in = bin.path().join("kafka-topics.sh");
    fs::write(&stand_in, STAND_IN).unwrap();
    fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("bash")
        .arg(root().join("deployments/kafka/topics.sh"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("KAFKA_BROKERS", &service.environment()["KAFKA_BROKERS"])
        .env("KAFKA_BIN", bin.path())
        .env("RETRY_DELAY", "0")
        .env("FAILS", fails.to_string())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let asked = fs::read_to_string(bin.path().join("kafka-topics.sh.asked")).unwrap();
    let asked = asked.lines().map(str::to_owned).collect();
    (output.status.code(), said, asked)
}

#[tokio::test]
async fn topics_are_asked_for_again_until_the_brokers_can_make_them() {
    let (code, said, asked) = run(2).await;
    assert_eq!(code, Some(0), "{said}");
    let names: Vec<_> = asked
        .iter()
        .map(|line| line.split("--topic ").nth(1).unwrap())
        .map(|after| after.split(' ').next().unwrap())
        .collect();
    assert_eq!(names, ["orders", "orders", "orders", "orders.dlq"]);
    for line in &asked {
        assert!(
            line.starts_with("--bootstrap-server kafka-1:9092,"),
            "{line}"
        );
        assert!(line.contains(" --if-not-exists "), "{line}");
        assert!(line.contains(" --replication-factor 3 "), "{line}");
    }
    assert!(asked[3].ends_with("--config retention.ms=-1"), "{asked:?}");
}

#[tokio::test]
async fn brokers_that_never_can_are_said_and_the_script_fails() {
    let (code, said, asked) = run(usize::MAX >> 1).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("orders was not made in 10 tries"), "{said}");
    assert!(asked.len() > 2, "{asked:?}");
}
