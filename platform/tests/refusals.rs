//! A call too many is told so at once, with a trace id, and counted; it makes no span, so that turning calls away stays cheap.
//! A process of its own, because whether a span is made is remembered by the process.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::Stream;
use platform::{
    config::Limits,
    grpc::{Guard, TRACE_ID},
    roles::{Methods, Policy, Role},
};
use prometheus::TextEncoder;
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};
use tracing::{
    Subscriber,
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

const METHODS: Methods = &[("/grpc.health.v1.Health/Check", Role::ANY)];

/// Answers when it is let.
#[derive(Clone)]
struct Probe(Arc<Semaphore>);

#[tonic::async_trait]
impl Health for Probe {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.0.acquire().await.unwrap().forget();
        Ok(Response::new(HealthCheckResponse::default()))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("not watched here"))
    }
}

/// Counts the spans of calls.
#[derive(Clone, Default)]
struct Spans(Arc<AtomicUsize>);

impl<S: Subscriber> Layer<S> for Spans {
    fn on_new_span(&self, span: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        if span.metadata().name() == "grpc.call" {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The counters of the door that say `what`.
fn counted(what: &str) -> Vec<String> {
    let text = TextEncoder::new().encode_to_string(&prometheus::gather());
    let text = text.unwrap();
    let lines = text.lines().filter(|line| line.contains(what));
    lines.map(str::to_owned).collect()
}

#[tokio::test]
async fn a_call_too_many_is_counted_and_makes_no_span() {
    let spans = Spans::default();
    let subscriber = tracing_subscriber::registry().with(spans.clone());
    let _installed = tracing::subscriber::set_default(subscriber);
    let limits = Limits {
        in_flight: 1,
        ..Limits::default()
    };
    let go = Arc::new(Semaphore::new(0));
    let guard = Guard::new("crowded", &limits, Policy::new(METHODS, None));
    let mut first = HealthClient::new(guard.wrap(HealthServer::new(Probe(go.clone()))));
    let mut other = first.clone();

    let mut held = Box::pin(first.check(HealthCheckRequest::default()));
    assert!(futures::poll!(&mut held).is_pending());
    let refused = other.check(HealthCheckRequest::default()).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let trace_id = refused.metadata().get(TRACE_ID).unwrap().to_str().unwrap();
    assert_eq!(trace_id.len(), 32, "{trace_id}");
    assert_eq!(spans.0.load(Ordering::SeqCst), 1, "of the call let in");
    assert_eq!(
        counted("crowded_counter_requests_total{"),
        ["crowded_counter_requests_total{type=\"router\"} 1"]
    );
    let timed = counted("crowded_histogram_response_time_seconds_count{");
    assert_eq!(timed.len(), 1, "{timed:?}");
    assert!(
        timed[0].contains("status=\"ResourceExhausted\"") && timed[0].ends_with(" 1"),
        "{timed:?}"
    );

    go.add_permits(2);
    held.await.unwrap();
    let next = other.check(HealthCheckRequest::default()).await;
    next.expect("the place is free again");
    assert_eq!(spans.0.load(Ordering::SeqCst), 2);
}
