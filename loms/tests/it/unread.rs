//! Output that is not read: a pipe holds 64 KiB, and what writes to a full one waits for ever.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use proto::loms::{StocksRequest, loms_client::LomsClient};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};
use tonic::transport::Channel;

use crate::{
    kafka,
    process::{self, LOMS},
};

#[tokio::test]
async fn a_log_that_is_not_read_stops_nothing() {
    let pool = crate::database().await;
    let topic = kafka::unused_topic();
    kafka::create_topic(&topic).await;
    let config = process::config(&pool, &topic, &json!({"log": {"level": "debug"}}));
    let mut child = Command::new(LOMS)
        .args(["serve", "--config", config.path()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // read up to the line with the addresses, then kept and read no more
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said: Value = loop {
        let line = lines.next_line().await.unwrap().expect("its addresses");
        let said: Value = serde_json::from_str(&line).unwrap();
        if said["grpc"].is_string() {
            break said;
        }
    };
    let endpoint = Channel::from_shared(format!("http://{}", said["grpc"].as_str().unwrap()));
    let mut loms = LomsClient::new(endpoint.unwrap().connect_lazy());
    let http = format!("http://{}", said["http"].as_str().unwrap());
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let client = reqwest::Client::new();
    crate::test_app::eventually("ready", async || {
        let ready = client.get(format!("{http}/readyz")).send().await;
        ready.is_ok_and(|answer| answer.status() == 200)
    })
    .await;

    // the queue takes several MiB more than the pipe
    let by = Instant::now() + Duration::from_secs(120);
    let lost = loop {
        assert!(Instant::now() < by, "nothing was lost");
        for _ in 0..100 {
            let began = Instant::now();
            loms.stocks(StocksRequest { sku: 7 }).await.unwrap();
            assert!(began.elapsed() < Duration::from_secs(3));
        }
        let metrics = client.get(format!("{http}/metrics")).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        let of = |level: &str| {
            let name = format!("loms_log_lost_total{{level=\"{level}\"}} ");
            let lost = metrics.lines().find_map(|line| line.strip_prefix(&name));
            lost.expect(&name).parse::<u64>().unwrap()
        };
        assert_eq!(of("error") + of("warn"), 0);
        if of("debug") > 0 {
            break of("debug");
        }
    };
    println!("{lost} lines lost");
    let health = client.get(format!("{http}/healthz")).send().await.unwrap();
    assert_eq!(health.status(), 200);

    let pid = child.id().unwrap().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-TERM", &pid])
        .status();
    assert!(sent.unwrap().success());
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait()).await;
    assert_eq!(
        ended.expect("an end within shutdown_grace").unwrap().code(),
        Some(0)
    );
    drop(lines);
}
