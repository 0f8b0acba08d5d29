//! `deployments/graylog/inputs.sh` against a stand-in for Graylog's API: what it makes, that it makes it once, and what it
//! says when it cannot.

use std::{
    process::Output,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, process::Command, task::JoinSet};

use crate::deployments::{Compose, root};

/// `admin:secret`, as HTTP's basic authentication writes it.
const AUTHORIZATION: &str = "Basic YWRtaW46c2VjcmV0";

#[derive(Default)]
struct Graylog {
    inputs: Vec<Value>,
    /// How often the states are asked for before the last input runs.
    slow: usize,
    refuses: bool,
}

type Shared = Arc<Mutex<Graylog>>;

/// A Graylog that serves until it is dropped.
struct StandIn {
    graylog: Shared,
    api: String,
    _serving: JoinSet<()>,
}

impl StandIn {
    async fn start(graylog: Graylog) -> StandIn {
        let graylog = Arc::new(Mutex::new(graylog));
        let routes = Router::new()
            .route("/api/system/inputs", get(list).post(create))
            .route("/api/system/inputstates", get(states))
            .with_state(graylog.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = format!("http://{}/api", listener.local_addr().unwrap());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        StandIn {
            graylog,
            api,
            _serving: serving,
        }
    }

    fn inputs(&self) -> Vec<Value> {
        self.graylog.lock().unwrap().inputs.clone()
    }
}

/// As Graylog does: 401 without the password, 400 for a writer that does not say who it is.
fn refusal(headers: &HeaderMap, writes: bool) -> Option<Response> {
    let says = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if says("authorization") != Some(AUTHORIZATION) {
        return Some(StatusCode::UNAUTHORIZED.into_response());
    }
    (writes && says("x-requested-by").is_none()).then(|| StatusCode::BAD_REQUEST.into_response())
}

async fn list(State(graylog): State<Shared>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refusal(&headers, false) {
        return refusal;
    }
    let inputs = graylog.lock().unwrap().inputs.clone();
    let body = json!({"inputs": inputs, "total": inputs.len()});
    // with white space, which Graylog's own answers have none of
    serde_json::to_string_pretty(&body).unwrap().into_response()
}

async fn create(
    State(graylog): State<Shared>,
    headers: HeaderMap,
    Json(request): Json<Value>,
) -> Response {
    if let Some(refusal) = refusal(&headers, true) {
        return refusal;
    }
    let mut graylog = graylog.lock().unwrap();
    if graylog.refuses {
        let body = json!({"type": "ApiError", "message": "no such input type"});
        return (StatusCode::NOT_FOUND, Json(body)).into_response();
    }
    let id = format!("{:024x}", graylog.inputs.len() + 1);
    // the order of the fields is Graylog's
    graylog.inputs.push(json!({
        "title": request["title"], "global": request["global"], "name": "GELF TCP", "content_pack": null, "id": id,
        "type": request["type"], "attributes": request["configuration"], "static_fields": {}, "node": null,
    }));
    (StatusCode::CREATED, Json(json!({"id": id}))).into_response()
}

async fn states(State(graylog): State<Shared>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refusal(&headers, false) {
        return refusal;
    }
    let mut graylog = graylog.lock().unwrap();
    let slow = graylog.slow > 0;
    graylog.slow = graylog.slow.saturating_sub(1);
    let last = graylog.inputs.len() - 1;
    let states = graylog.inputs.iter().enumerate().map(|(index, input)| {
        let state = if slow && index == last { "STARTING" } else { "RUNNING" };
        json!({"id": input["id"], "state": state, "started_at": "2026-01-01T00:00:00.000Z", "detailed_message": null,
            "message_input": input})
    });
    let states: Vec<_> = states.collect();
    Json(json!({"states": states})).into_response()
}

/// Runs the script as its container would, with a shell that knows no more than POSIX.
async fn run(api: &str, password: &str) -> (Output, String) {
    let compose = Compose::load("docker-compose.logs.yaml");
    let service = compose.service("graylog-inputs");
    assert_eq!(service.list("entrypoint"), ["sh", "/inputs.sh"]);
    let names = service.environment().into_keys();
    assert!(names.eq(["GRAYLOG_API", "GRAYLOG_ROOT_PASSWORD"]));
    let output = Command::new("sh")
        .arg(root().join("deployments/graylog/inputs.sh"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("GRAYLOG_API", api)
        .env("GRAYLOG_ROOT_PASSWORD", password)
        .env("RETRY_DELAY", "0")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output, said)
}

#[tokio::test]
async fn three_inputs_are_made_and_made_once() {
    let graylog = StandIn::start(Graylog {
        slow: 2,
        ..Graylog::default()
    })
    .await;
    let (output, said) = run(&graylog.api, "secret").await;
    assert!(output.status.success(), "{said}");
    let made = graylog.inputs();
    let summary: Vec<_> = made
        .iter()
        .map(|input| {
            (
                input["title"].as_str().unwrap(),
                input["attributes"]["port"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = [
        ("gelf-checkout", 12201),
        ("gelf-loms", 12202),
        ("gelf-notifications", 12203),
    ];
    assert_eq!(summary, expected);
    for input in &made {
        assert_eq!(input["type"], "org.graylog2.inputs.gelf.tcp.GELFTCPInput");
        assert_eq!(input["global"], true);
        assert_eq!(input["attributes"]["bind_address"], "0.0.0.0");
        assert_eq!(input["attributes"]["use_null_delimiter"], true);
    }

    let (output, said) = run(&graylog.api, "secret").await;
    assert!(output.status.success(), "{said}");
    assert_eq!(graylog.inputs(), made, "a second run makes nothing");
}

#[tokio::test]
async fn what_is_missing_is_made() {
    let graylog = StandIn::start(Graylog::default()).await;
    run(&graylog.api, "secret").await;
    graylog.graylog.lock().unwrap().inputs.remove(1);
    let (output, said) = run(&graylog.api, "secret").await;
    assert!(output.status.success(), "{said}");
    let titles: Vec<_> = graylog
        .inputs()
        .iter()
        .map(|input| input["title"].as_str().unwrap().to_owned())
        .collect();
    let expected = ["gelf-checkout", "gelf-notifications", "gelf-loms"];
    assert_eq!(titles, expected);
}

#[tokio::test]
async fn what_cannot_be_made_is_said_and_the_script_fails() {
    let graylog = StandIn::start(Graylog::default()).await;
    let (output, said) = run(&graylog.api, "another").await;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("GRAYLOG_ROOT_PASSWORD_SHA2"), "{said}");
    assert!(graylog.inputs().is_empty());

    graylog.graylog.lock().unwrap().refuses = true;
    let (output, said) = run(&graylog.api, "secret").await;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("404"), "{said}");
    assert!(said.contains("no such input type"), "{said}");

    let stuck = StandIn::start(Graylog {
        slow: usize::MAX,
        ..Graylog::default()
    })
    .await;
    let (output, said) = run(&stuck.api, "secret").await;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("STARTING"), "{said}");

    let (output, said) = run("http://127.0.0.1:1/api", "secret").await;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no answer from"), "{said}");
}
