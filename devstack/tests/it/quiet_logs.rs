//! What the services write while something is away: a line a state, not a line a call. A log that fills a disk hides what else
//! goes wrong.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use devstack::{
    binaries::SERVICES,
    broker,
    clients::http_client,
    ports::Reserved,
    postgres,
    stack::{Options, Stack},
};
use futures::future::join_all;
use serde_json::{Value, json};

use crate::test_stack::{binaries, eventually};

/// Callers at once, of each route.
const CALLERS: usize = 4;
/// Calls of each service that fail while the database is away: each of them was a line, or more than one.
const FAILURES: usize = 400;
/// Lines of WARN and ERROR in one log. There are about fifteen states, each begins once, and is said again after a minute;
/// and PostgreSQL says good-bye to each of about fifteen connections.
const LINES: usize = 45;

/// Service, route, body.
const ROUTES: [(&str, &str, &str); 6] = [
    ("checkout", "addToCart", r#"{"user":1,"sku":7,"count":1}"#),
    ("checkout", "purchase", r#"{"user":1}"#),
    (
        "loms",
        "createOrder",
        r#"{"user":1,"items":[{"sku":7,"count":1}]}"#,
    ),
    ("loms", "orderPayed", r#"{"orderID":1}"#),
    ("loms", "listOrder", r#"{"orderID":1}"#),
    (
        "notifications",
        "history",
        r#"{"user":1,"from":{"year":2020,"month":1,"day":1},"to":{"year":2100,"month":1,"day":1}}"#,
    ),
];

/// What callers were told, by service: that it cannot be done now, or something else.
#[derive(Default)]
struct Told {
    refused: [AtomicUsize; SERVICES.len()],
    answered: [AtomicUsize; SERVICES.len()],
}

impl Told {
    fn all(counts: &[AtomicUsize], least: usize) -> bool {
        counts
            .iter()
            .all(|count| count.load(Ordering::SeqCst) >= least)
    }
}

/// Calls `url` again and again until `done`.
async fn call(url: String, body: &str, service: usize, told: &Told, done: &AtomicBool) {
    let http = http_client().unwrap();
    while !done.load(Ordering::SeqCst) {
        let request = http.post(&url).body(body.to_owned()).send();
        let status = request.await.expect("the service lives").status();
        let counts = if status.is_server_error() {
            &told.refused
        } else {
            &told.answered
        };
        counts[service].fetch_add(1, Ordering::SeqCst);
    }
}

/// WARN and ERROR of a log, by message.
fn complaints(log: &PathBuf) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for line in fs::read_to_string(log).unwrap().lines() {
        // the first line says the ports
        let line: Value = serde_json::from_str(line).unwrap_or_default();
        if ["WARN", "ERROR"]
            .iter()
            .any(|level| line["level"] == *level)
        {
            let message = line["message"].as_str().unwrap_or_default().to_owned();
            *found.entry(message).or_default() += 1;
        }
    }
    found
}

fn says(log: &PathBuf, message: &str) -> bool {
    let message = format!("\"message\":\"{message}\"");
    fs::read_to_string(log).unwrap().contains(&message)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_away_is_a_line_a_state_and_not_a_line_a_call() {
    // nobody listens there: the agent's host is there, and refuses every packet
    let nobody = Reserved::any().unwrap();
    let jaeger = json!({"jaeger": {"host": "127.0.0.1", "port": nobody.address().port()}});
    let options = Options {
        quiet: true,
        settings: json!({"checkout": jaeger, "loms": jaeger, "notifications": jaeger}),
        postgres: postgres::Source::Own,
        broker: broker::Source::Mock,
        ..Options::new(binaries().await)
    };
    let mut stack = Stack::start(&options).await.unwrap();
    let (told, done) = (Told::default(), AtomicBool::new(false));
    let callers = ROUTES.iter().flat_map(|(service, route, body)| {
        let index = SERVICES.iter().position(|name| name == service).unwrap();
        let url = format!("http://{}/{route}", stack.service(service).unwrap().http());
        let (told, done) = (&told, &done);
        (0..CALLERS).map(move |_| call(url.clone(), body, index, told, done))
    });
    let callers = join_all(callers.collect::<Vec<_>>());
    let logs = SERVICES.map(|name| stack.service(name).unwrap().log().to_owned());
    let disturbing = async {
        eventually("calls that work", async || Told::all(&told.answered, 20)).await;
        let (_, broker, database) = stack.parts();
        database.crash().await.unwrap();
        broker.take_away().await.unwrap();
        eventually("calls that fail", async || {
            Told::all(&told.refused, FAILURES)
        })
        .await;
        database.recover().await.unwrap();
        broker.bring_back().await.unwrap();
        eventually("the end of it", async || {
            let back = "database is available again";
            logs.iter().all(|log| says(log, back))
        })
        .await;
        done.store(true, Ordering::SeqCst);
    };
    tokio::join!(callers, disturbing);
    for (name, log) in SERVICES.iter().zip(&logs) {
        let found = complaints(log);
        let lines: usize = found.values().sum();
        assert!(lines <= LINES, "{name} has written {lines}: {found:#?}");
        // again after a minute, should the machine take so long
        for state in ["database unavailable", "spans lost"] {
            let said = found.get(state).copied().unwrap_or_default();
            assert!((1..=3).contains(&said), "{name}, {state}: {found:#?}");
        }
    }
    stack.stop().await.unwrap();
}
