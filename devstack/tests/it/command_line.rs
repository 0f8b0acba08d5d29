//! The commands as a person runs them: exit codes, one clear line for what is wrong, and nothing left running.

use std::{net::TcpListener, path::Path, process::Stdio, time::Duration};

use devstack::kafka::Tools;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::test_stack::{DEVSTACK, binaries, devstack, eventually};

/// A walk takes 20 s on an idle machine, and its own bound is a minute.
const WALK_BOUND: Duration = Duration::from_secs(150);
/// Its 5 s, a start, and all that may take a while to come to rest.
const CHAOS_BOUND: Duration = Duration::from_secs(180);
/// A download, the first time, and two starts of Java.
const KAFKA_BOUND: Duration = Duration::from_secs(240);

#[tokio::test]
async fn the_demo_walks_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let output = timeout(WALK_BOUND, devstack(&["demo", "--no-build"], dir.path()))
        .await
        .expect("the demo ends");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let summary = stdout.lines().last().unwrap_or_default();
    assert!(
        summary.starts_with("A purchase runs end to end: "),
        "{stdout}"
    );
}

#[tokio::test]
async fn a_killed_devstack_leaves_nothing_running() {
    binaries().await;
    let mut demo = spawn(&["demo", "--no-build"]);
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        if line.contains("AddToCart") {
            break;
        }
    }
    let children = descendants(demo.id().expect("it runs"));
    assert!(
        children.len() >= 4,
        "three services and the owner of PostgreSQL, unless DATABASE_URL is set: {children:?}"
    );
    // SIGKILL: nothing of devstack's own can run any more
    demo.kill().await.unwrap();
    eventually("every child has ended", async || {
        !children.iter().any(|pid| is_running(*pid))
    })
    .await;
}

#[tokio::test]
async fn chaos_ends_with_its_figures_and_without_java_uses_the_mock_cluster() {
    binaries().await;
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let output = Command::new(DEVSTACK)
        .args([
            "chaos",
            "--seconds",
            "5",
            "--seed",
            "2",
            "--no-build",
            "--json",
        ])
        .arg(&json)
        // nothing is found there, java neither
        .env("PATH", dir.path())
        .kill_on_drop(true)
        .output();
    let output = timeout(CHAOS_BOUND, output)
        .await
        .expect("it ends")
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.starts_with("using the mock cluster"), "{stdout}");
    let figures = stdout.lines().last().unwrap_or_default();
    for part in ["2 kills", "1 broker outages", "1 database restarts"] {
        assert!(figures.contains(part), "{figures}");
    }
    assert!(
        figures.contains("lost 0, duplicated 0, wrong 0, audit clean"),
        "{figures}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(
        (&report["lost"], &report["audit"]),
        (&0.into(), &"clean".into())
    );
}

#[tokio::test]
async fn a_killed_devstack_takes_its_kafka_along() {
    if let Err(error) = Tools::find().await {
        return eprintln!("not tested: {error}");
    }
    let mut kafka = spawn(&["kafka"]);
    let mut lines = BufReader::new(kafka.stdout.take().unwrap()).lines();
    let address = timeout(KAFKA_BOUND, lines.next_line()).await.unwrap();
    assert!(address.unwrap().is_some(), "it says where it listens");
    let children = descendants(kafka.id().expect("it runs"));
    assert_eq!(children.len(), 2, "its owner and java: {children:?}");
    kafka.kill().await.unwrap();
    eventually("the owner and java have ended", async || {
        !children.iter().any(|pid| is_running(*pid))
    })
    .await;
}

#[tokio::test]
async fn pg_runs_a_command_and_answers_its_code() {
    let script = "test -n \"$DATABASE_URL\" && exit 7";
    let output = devstack(&["pg", "--", "bash", "-c", script], Path::new("/")).await;
    assert_eq!(
        output.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // if someone else has it, it is taken too
    let _listener = TcpListener::bind("127.0.0.1:50051");
    let output = devstack(&["up", "--no-build"], dir.path()).await;
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{stderr}");
    assert!(
        stderr.contains("50051") && stderr.lines().count() == 1,
        "{stderr}"
    );
}

#[tokio::test]
async fn a_wrong_url_is_named() {
    let output = Command::new(DEVSTACK)
        .args(["pg", "--", "true"])
        .env("DATABASE_URL", "postgres://postgres@127.0.0.1:1/postgres")
        .output()
        .await
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{stderr}");
    assert!(
        stderr.contains("DATABASE_URL") && stderr.lines().count() == 1,
        "{stderr}"
    );
}

fn spawn(arguments: &[&str]) -> Child {
    let mut command = Command::new(DEVSTACK);
    // an embedded server of its own, whose end is part of the question
    command
        .args(arguments)
        .env_remove("DATABASE_URL")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.kill_on_drop(true).spawn().unwrap()
}

/// Every process below `pid`.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        let children = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = children.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        found.extend(pids.filter(|pid| status(*pid).is_some_and(|(_, of)| of == parent)));
    }
    found.split_off(1)
}

/// A process's state and parent.
fn status(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name before it, in parentheses, may hold anything
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// A zombie waits for init, which is not ours to judge.
fn is_running(pid: u32) -> bool {
    status(pid).is_some_and(|(state, _)| state != 'Z')
}
