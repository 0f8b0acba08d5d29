//! The commands as a person runs them: exit codes, one clear line for what is wrong, and nothing left running.

use std::{
    fs::Permissions,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use devstack::kafka::Tools;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    deployments::root,
    test_stack::{DEVSTACK, binaries, devstack, eventually},
};

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

/// devstack with an embedded server, and `tmp` for its temporary folders.
fn with_tmpdir(tmp: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(DEVSTACK);
    command
        .args(arguments)
        .env_remove("DATABASE_URL")
        .env("TMPDIR", tmp)
        .kill_on_drop(true);
    command
}

/// A folder of the data's that only whoever made it may look into: it cannot be removed by the owner of the server, who is
/// somebody else, nor by ourselves, for whom it has no mode.
fn spoil(data: &Path) {
    let kept = data.join("kept");
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("file"), "").unwrap();
    std::fs::set_permissions(&kept, Permissions::from_mode(0o000)).unwrap();
}

/// What [`spoil`] has made, removed by those who may.
fn restore(data: &Path) {
    std::fs::set_permissions(data.join("kept"), Permissions::from_mode(0o700)).unwrap();
    std::fs::remove_dir_all(data).unwrap();
}

fn data_in(tmp: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(tmp).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    paths.find(|path| path.to_string_lossy().contains("devstack-pg-"))
}

#[tokio::test]
async fn a_temporary_folder_that_others_cannot_write_is_none() {
    for mode in [0o700, 0o755, 0o1777] {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(tmp.path(), Permissions::from_mode(mode)).unwrap();
        let output = with_tmpdir(tmp.path(), &["pg", "--", "sh", "-c", "exit 7"]).output();
        let output = output.await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(7), "{mode:o}: {stderr}");
        assert_eq!(stderr, "", "{mode:o}");
        assert_eq!(data_in(tmp.path()), None, "{mode:o}");
    }
}

#[tokio::test]
async fn a_clean_up_that_fails_is_reported_and_takes_no_result() {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::set_permissions(tmp.path(), Permissions::from_mode(0o1777)).unwrap();
    let mut pg = with_tmpdir(tmp.path(), &["pg", "--", "sh", "-c", "read go; exit 7"]);
    pg.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut pg = pg.spawn().unwrap();
    eventually("the data", async || data_in(tmp.path()).is_some()).await;
    let data = data_in(tmp.path()).unwrap();
    spoil(&data);
    drop(pg.stdin.take());
    let output = pg.wait_with_output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    restore(&data);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert!(
        stderr.contains("cleaning up: PostgreSQL did not stop cleanly"),
        "{stderr}"
    );

    // the result of a replay is on stdout before anything is cleaned up
    binaries().await;
    let folder = root().join("devstack/data/retail");
    let folder = folder.to_str().unwrap();
    let arguments = [
        "replay",
        folder,
        "--through",
        "loms",
        "--concurrency",
        "8",
        "--no-build",
    ];
    let mut replay = with_tmpdir(tmp.path(), &arguments);
    replay.stdout(Stdio::piped()).stderr(Stdio::piped());
    let replay = replay.spawn().unwrap();
    eventually("the data", async || data_in(tmp.path()).is_some()).await;
    let data = data_in(tmp.path()).unwrap();
    spoil(&data);
    let output = replay.wait_with_output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    restore(&data);
    let result: Value = serde_json::from_slice(&output.stdout).expect(&stderr);
    assert_eq!(result["audit"]["consistent"], true);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("cleaning up: PostgreSQL did not stop cleanly"),
        "{stderr}"
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
