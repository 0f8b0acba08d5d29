//! What every service answers besides its business: health, reflection, metrics, readiness, trace ids.

use std::{future::poll_fn, pin::Pin};

use axum::{body::HttpBody as _, http::Request};
use futures::{StreamExt as _, future::join_all, stream};
use proto::loms::{StocksRequest, loms_client::LomsClient};
use serde_json::{Value, json};
use tonic::{
    Code,
    client::{Grpc, GrpcService as _},
    codec::CompressionEncoding,
    codegen::http::uri::PathAndQuery,
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    oracle,
    test_app::{TestApp, eventually, order},
};

/// Requests of clients that compress are read, within the same bounds.
#[tokio::test]
async fn compressed_requests_are_read() {
    let app = TestApp::start(&crate::database().await, json!({})).await;
    app.receive("d1", &[(1, 7, 100)]).await.unwrap();
    let gzip = CompressionEncoding::Gzip;
    let loms = LomsClient::new(app.channel.clone()).send_compressed(gzip);
    let many = join_all((0..100).map(|user| {
        let mut loms = loms.clone();
        async move { loms.create_order(order(1 + user, &[(7, 1)], "")).await }
    }));
    for made in many.await {
        assert_eq!(made.unwrap().into_inner().status, "awaiting payment");
    }
    let mut health = HealthClient::new(app.channel.clone()).send_compressed(gzip);
    health.check(HealthCheckRequest::default()).await.unwrap();
    // 4 MiB are allowed, and this is a few KiB on the wire
    let bomb = order(1, &[(7, 1)], &"x".repeat(5 << 20));
    let refused = loms.clone().create_order(bomb).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    app.finish().await;
}

#[tokio::test]
async fn health_and_readiness_follow_the_schema() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let check = async |service: &str| {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let answer = HealthClient::new(app.channel.clone()).check(request).await;
        answer.map(|answer| answer.into_inner().status().as_str_name())
    };
    for service in ["", "loms.Loms"] {
        eventually("SERVING", async || {
            check(service).await.unwrap() == "SERVING"
        })
        .await;
    }
    assert_eq!(
        check("loms.Other").await.unwrap_err().code(),
        Code::NotFound
    );
    let report = json!({"ready": true, "database": "ok", "kafka": "ok"});
    eventually("a report", async || {
        app.get("/readyz").await.json() == report
    })
    .await;
    assert_eq!(app.get("/healthz").await.status, 200);

    oracle::run(
        &pool,
        "UPDATE loms._sqlx_migrations SET version = -version WHERE version > 1",
    )
    .await;
    // a machine that stalls for seconds may hear "away" first
    eventually("unready, and why", async || {
        let answer = app.get("/readyz").await;
        let why = answer.json()["database"].as_str().map(str::to_owned);
        answer.status == 503 && why.is_some_and(|why| why.contains("migrate"))
    })
    .await;
    eventually("NOT_SERVING", async || {
        check("loms.Loms").await.unwrap() == "NOT_SERVING"
    })
    .await;
    assert_eq!(app.get("/healthz").await.status, 200);
    oracle::run(
        &pool,
        "UPDATE loms._sqlx_migrations SET version = -version WHERE version < 0",
    )
    .await;
    eventually("SERVING again", async || {
        check("").await.unwrap() == "SERVING"
    })
    .await;
    app.finish().await;
}

#[tokio::test]
async fn reflection_shows_the_contract() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let ask = async |question: MessageRequest| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(question),
        };
        let mut client = ServerReflectionClient::new(app.channel.clone());
        let answers = client
            .server_reflection_info(stream::iter([request]))
            .await
            .unwrap();
        let answer = answers
            .into_inner()
            .next()
            .await
            .expect("an answer")
            .unwrap();
        answer.message_response.expect("a response")
    };
    let MessageResponse::ListServicesResponse(list) =
        ask(MessageRequest::ListServices(String::new())).await
    else {
        panic!("no list")
    };
    let names: Vec<_> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    assert!(names.contains(&"loms.Loms") && names.contains(&"grpc.health.v1.Health"));
    assert!(!names.contains(&"cart.Cart"), "a neighbour: {names:?}");
    for symbol in [
        "loms.Loms",
        "loms.CreateOrderRequest",
        "google.protobuf.Timestamp",
    ] {
        let found = ask(MessageRequest::FileContainingSymbol(symbol.into())).await;
        let MessageResponse::FileDescriptorResponse(file) = found else {
            panic!("{symbol}: {found:?}")
        };
        assert!(!file.file_descriptor_proto.is_empty());
    }
    app.finish().await;
}

#[tokio::test]
async fn metrics_have_the_names_that_dashboards_read() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    app.receive("d1", &[(1, 7, 1)]).await.unwrap();
    let id = app.create(1, &[(7, 1)]).await.order_id;
    app.pay(id).await.unwrap();
    app.pay(i64::MAX).await.unwrap_err();
    eventually("an event that was counted", async || {
        app.get("/metrics")
            .await
            .text
            .contains("\nloms_outbox_sent_total ")
    })
    .await;
    let text = app.get("/metrics").await.text;
    for series in [
        "loms_histogram_response_time_seconds_count{method=\"/loms.Loms/CreateOrder\",status=\"OK\"}",
        "loms_histogram_response_time_seconds_count{method=\"/loms.Loms/OrderPayed\",status=\"NotFound\"}",
        "loms_counter_requests_total{type=\"router\"}",
        "loms_orders_total{status=\"payed\"}",
        "loms_placement_batch_orders_count",
    ] {
        assert!(text.contains(series), "{series} is not in\n{text}");
    }
    app.finish().await;
}

#[tokio::test]
async fn every_grpc_answer_has_a_trace_id() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let stocks = app
        .grpc
        .clone()
        .stocks(StocksRequest { sku: 1 })
        .await
        .unwrap();
    let id = stocks
        .metadata()
        .get("x-trace-id")
        .expect("a trace id")
        .as_bytes();
    assert_eq!(id.len(), 32);
    let health = HealthClient::new(app.channel.clone())
        .check(HealthCheckRequest::default())
        .await;
    assert!(
        health.unwrap().metadata().contains_key("x-trace-id"),
        "health"
    );
    for path in ["/loms.Loms/Nothing", "/nobody.Knows/This"] {
        let mut grpc = Grpc::new(app.channel.clone());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<StocksRequest, StocksRequest>::default();
        let request = tonic::Request::new(StocksRequest { sku: 1 });
        let answer = grpc
            .unary(request, PathAndQuery::from_static(path), codec)
            .await;
        let status = answer.expect_err("no such method");
        assert_eq!(status.code(), Code::Unimplemented);
        assert!(status.metadata().contains_key("x-trace-id"), "{path}");
    }
    app.finish().await;
}

/// As clients that tell headers from trailers see it.
#[tokio::test]
async fn a_refusal_has_its_trace_id_in_its_headers() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    for (path, message, code) in [
        // order 9, and a service called x
        ("/loms.Loms/ListOrder", &[8, 9][..], Code::NotFound),
        ("/loms.Loms/Nothing", &[], Code::Unimplemented),
        ("/nobody.Knows/This", &[], Code::Unimplemented),
        (
            "/grpc.health.v1.Health/Check",
            &[10, 1, b'x'],
            Code::NotFound,
        ),
    ] {
        let mut channel = app.channel.clone();
        poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
        let sent = [&[0, 0, 0, 0, message.len() as u8][..], message].concat();
        let request = Request::post(path)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(tonic::body::Body::new(axum::body::Body::from(sent)));
        let answer = channel.call(request.unwrap()).await.unwrap();
        assert!(!answer.headers().contains_key("grpc-status"), "{path}");
        let id = answer.headers()["x-trace-id"].clone();
        assert_eq!(answer.headers()["content-type"], "application/grpc");
        let mut body = answer.into_body();
        let frame = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let trailers = frame.unwrap().unwrap().into_trailers().unwrap();
        let said = Code::from_bytes(trailers["grpc-status"].as_bytes());
        assert_eq!(said, code, "{path}");
        assert_eq!(trailers["x-trace-id"], id, "{path}");
        assert!(!trailers.contains_key("content-type"), "{path}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_deadline_over_http_is_read_or_refused() {
    let pool = crate::database().await;
    let app = TestApp::start(&pool, json!({})).await;
    let web = reqwest::Client::new();
    for (timeout, status, code) in [
        ("1n", 504, 4),
        ("abc", 400, 3),
        ("", 400, 3),
        ("123456789S", 400, 3),
        ("-1S", 400, 3),
        ("5S", 200, 0),
        ("99999999H", 200, 0),
    ] {
        let sent = web
            .post(format!("{}/stocks", app.url))
            .header("Grpc-Timeout", timeout)
            .body(r#"{"sku": 1}"#);
        let answer = sent.send().await.unwrap();
        assert_eq!(answer.status(), status, "{timeout}");
        let body: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        assert_eq!(body["code"].as_i64().unwrap_or(0), code, "{body}");
    }
    app.finish().await;
}

/// By default they listen on `[::]`.
#[tokio::test]
async fn ports_answer_over_ipv6_and_ipv4() {
    let pool = crate::database().await;
    let listen = json!({"listen": "[::]:0"});
    let app = TestApp::start(&pool, json!({"grpc": listen, "http": listen})).await;
    let port = app.url.rsplit(':').next().unwrap();
    for host in ["127.0.0.1", "[::1]"] {
        let live = reqwest::get(format!("http://{host}:{port}/healthz")).await;
        assert_eq!(live.unwrap().status(), 200, "{host}");
    }
    app.finish().await;
}
