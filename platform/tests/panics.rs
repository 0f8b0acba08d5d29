//! A panic is the fault of one call: INTERNAL, a line of the log in the trace of the call, a counter, and the next call is
//! answered. A process of its own, because the hook and the subscriber are the process's.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{pin::Pin, time::Duration};

use futures::Stream;
use platform::{
    config::{GraylogConfig, JaegerConfig, Limits, LogConfig},
    grpc::{Guard, Guarded, TRACE_ID},
    roles::Policy,
    tasks::Tasks,
    telemetry,
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::{TcpListener, TcpStream},
};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};
use tracing::Instrument as _;

/// Panics where it is asked to.
#[derive(Clone, Default)]
struct Probe(Tasks);

#[tonic::async_trait]
impl Health for Probe {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match request.get_ref().service.as_str() {
            "handler" => panic!("the handler panicked"),
            "task" => {
                let work = async { panic!("the task panicked") };
                let ended = self.0.run::<()>("work", work).await;
                assert!(ended.is_err(), "a task that panicked has no answer");
                Err(Status::internal("no answer"))
            }
            _ => Ok(Response::new(HealthCheckResponse::default())),
        }
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        panic!("panicked before the stream began")
    }
}

fn asking(service: &str) -> Request<HealthCheckRequest> {
    Request::new(HealthCheckRequest {
        service: service.to_owned(),
    })
}

fn panics() -> f64 {
    let families = prometheus::gather();
    let counted = families
        .iter()
        .find(|family| family.name() == "probe_counter_panics_total");
    counted.unwrap().get_metric()[0].get_counter().get_value()
}

/// Waits for the panic's line; its trace and its text.
async fn line(frames: &mut BufReader<TcpStream>) -> (String, String) {
    loop {
        let mut frame = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), frames.read_until(0, &mut frame));
        read.await.expect("a line").unwrap();
        let frame: Value = serde_json::from_slice(&frame[..frame.len() - 1]).unwrap();
        if frame["short_message"] == "panicked" {
            assert_eq!(frame["level"], 3);
            assert!(
                frame["_panic.location"]
                    .as_str()
                    .unwrap()
                    .contains("panics.rs")
            );
            let text = |key: &str| frame[key].as_str().unwrap_or_default().to_owned();
            return (text("_trace_id"), text("_panic.message"));
        }
    }
}

type Local = HealthClient<Guarded<HealthServer<Probe>>>;

/// The trace of an answer that says INTERNAL and nothing of the cause.
async fn is_internal(probe: &mut Local, service: &str) -> String {
    let status = probe.check(asking(service)).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(!status.message().contains("panicked"), "{status:?}");
    let trace = status.metadata().get(TRACE_ID).unwrap();
    trace.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_panic_is_answered_logged_and_counted() {
    let graylog = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = GraylogConfig {
        host: "127.0.0.1".to_owned(),
        port: graylog.local_addr().unwrap().port(),
    };
    let (log, jaeger) = (LogConfig::default(), JaegerConfig::default());
    let telemetry = telemetry::init("probe", &log, &jaeger, &config).unwrap();
    let mut frames = BufReader::new(graylog.accept().await.unwrap().0);
    assert_eq!(panics(), 0.0, "there before it has happened");

    let guard = Guard::new("probe", &Limits::default(), Policy::new(&[], None));
    let mut probe = HealthClient::new(guard.wrap(HealthServer::new(Probe::default())));
    let trace = is_internal(&mut probe, "handler").await;
    assert_eq!(
        line(&mut frames).await,
        (trace, "the handler panicked".to_owned())
    );
    assert_eq!(panics(), 1.0);

    let trace = is_internal(&mut probe, "task").await;
    assert_eq!(
        line(&mut frames).await,
        (trace, "the task panicked".to_owned())
    );
    assert_eq!(panics(), 2.0);

    let status = probe.watch(asking("")).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    line(&mut frames).await;

    // beside the calls nobody is answered, and somebody should know all the same
    let beside = Tasks::new();
    let span = tracing::info_span!("beside");
    async { beside.detach(async { panic!("beside a call") }) }
        .instrument(span)
        .await;
    beside.drain().await;
    let (trace, text) = line(&mut frames).await;
    assert_eq!((trace.len(), text.as_str()), (32, "beside a call"));
    assert_eq!(panics(), 4.0);

    probe.check(asking("")).await.expect("it lives");
    telemetry.shutdown().await;
}
