//! Traces and logs. A tracer provider is always installed, so that every answer has a trace id; spans leave the process
//! only when `jaeger.host` is set. The only file that names opentelemetry-jaeger.

use std::{fmt, time::Duration};

use futures::future::BoxFuture;
use opentelemetry::{
    KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanContext, TraceContextExt as _, TraceError, TracerProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    export::trace::{ExportResult, SpanData, SpanExporter},
    propagation::TraceContextPropagator,
    runtime,
    trace::{BatchSpanProcessor, Config, TracerProvider},
};
use serde_json::{Map, Value};
use tokio::time::Instant;
use tracing::{Event, Span, Subscriber, field::Field, level_filters::LevelFilter};
use tracing_opentelemetry::{OpenTelemetrySpanExt as _, OtelData};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    field::Visit,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::{
    config::{JaegerConfig, LogConfig},
    error::StartError,
};

/// Keeps the exporter alive; [`Telemetry::shutdown`] sends what is left.
pub struct Telemetry(TracerProvider);

/// Installs the subscriber of the process. A second call in one process (tests) keeps the first.
///
/// # Errors
/// A log level that is none.
pub fn init(
    service: &'static str,
    log: &LogConfig,
    jaeger: &JaegerConfig,
) -> Result<Telemetry, StartError> {
    let filter = EnvFilter::try_new(&log.level).map_err(|error| {
        StartError::new(
            format!("log.level = {:?}: {error}", log.level),
            "write error, warn, info or debug",
        )
    })?;
    let resource = Resource::new([KeyValue::new("service.name", service)]);
    let mut builder =
        TracerProvider::builder().with_config(Config::default().with_resource(resource));
    if !jaeger.host.is_empty() {
        let exporter = AgentExporter::new(service, format!("{}:{}", jaeger.host, jaeger.port));
        builder = builder
            .with_span_processor(BatchSpanProcessor::builder(exporter, runtime::Tokio).build());
    }
    let provider = builder.build();
    // spans are made whatever the log level: the trace id of an answer does not depend on it
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_filter(LevelFilter::INFO);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(JsonLines)
        .with_filter(filter);
    let installed = tracing_subscriber::registry()
        .with(spans)
        .with(lines)
        .try_init();
    if installed.is_ok() {
        std::panic::set_hook(Box::new(|panic| {
            let location = panic
                .location()
                .map(ToString::to_string)
                .unwrap_or_default();
            tracing::error!(panic.message = %panic_text(panic.payload()), panic.location = %location, "panicked");
        }));
    }
    Ok(Telemetry(provider))
}

/// The text of a panic's payload.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}

impl Telemetry {
    /// Sends what is left, for at most `bound`: the exporter's own shutdown has none.
    pub async fn shutdown(self, bound: Duration) {
        let flush = tokio::task::spawn_blocking(move || drop(self.0));
        if tokio::time::timeout(bound, flush).await.is_err() {
            tracing::warn!("traces were not flushed in time");
        }
    }
}

/// The trace id of the current span, 32 hex digits; a random one where no span is recorded.
pub fn trace_id() -> String {
    let context = span_context();
    if context.is_valid() {
        context.trace_id().to_string()
    } else {
        format!("{:032x}", rand::random::<u128>())
    }
}

/// The current span as W3C `traceparent` text, to be carried to another process or stored in a row.
pub fn traceparent() -> Option<String> {
    let context = span_context();
    context.is_valid().then(|| {
        format!(
            "00-{}-{}-{:02x}",
            context.trace_id(),
            context.span_id(),
            context.trace_flags().to_u8()
        )
    })
}

/// Makes `span` a child of the span that `traceparent` names; anything unreadable is ignored.
pub fn set_parent(span: &Span, traceparent: &str) {
    span.set_parent(remote(traceparent));
}

/// Links `span` to the span that `traceparent` names: caused by it, not part of it.
pub fn link_to(span: &Span, traceparent: &str) {
    let context = remote(traceparent).span().span_context().clone();
    if context.is_valid() {
        span.add_link(context);
    }
}

fn span_context() -> SpanContext {
    Span::current().context().span().span_context().clone()
}

fn remote(traceparent: &str) -> opentelemetry::Context {
    struct One<'a>(&'a str);
    impl Extractor for One<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            (key == "traceparent").then_some(self.0)
        }
        fn keys(&self) -> Vec<&str> {
            vec!["traceparent"]
        }
    }
    // not from the current context: a worker's own span must not become the parent of what it reads
    TraceContextPropagator::new()
        .extract_with_context(&opentelemetry::Context::new(), &One(traceparent))
}

#[expect(
    deprecated,
    reason = "the agent protocol is required; upstream would have us on OTLP"
)]
type Agent = opentelemetry_jaeger::Exporter;

/// Jaeger's agent over UDP, found when there is something to send: its host name may resolve only later.
struct AgentExporter {
    service: &'static str,
    endpoint: String,
    agent: Option<Agent>,
    next_try: Instant,
}

impl AgentExporter {
    fn new(service: &'static str, endpoint: String) -> Self {
        AgentExporter {
            service,
            endpoint,
            agent: None,
            next_try: Instant::now(),
        }
    }

    fn connect(&mut self) {
        if self.agent.is_some() || Instant::now() < self.next_try {
            return;
        }
        #[expect(deprecated, reason = "as above")]
        let agent = opentelemetry_jaeger::new_agent_pipeline()
            .with_service_name(self.service)
            .with_endpoint(&self.endpoint)
            // a datagram that passes any link; larger batches are split
            .with_max_packet_size(9_000)
            .with_auto_split_batch(true)
            .build_sync_agent_exporter();
        match agent {
            Ok(agent) => self.agent = Some(agent),
            Err(error) => {
                tracing::warn!(jaeger.endpoint = %self.endpoint, error = %error, "jaeger agent not found");
                self.next_try = Instant::now() + Duration::from_secs(30);
            }
        }
    }
}

impl fmt::Debug for AgentExporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentExporter")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl SpanExporter for AgentExporter {
    fn export(&mut self, batch: Vec<SpanData>) -> BoxFuture<'static, ExportResult> {
        self.connect();
        match self.agent.as_mut() {
            Some(agent) => agent.export(batch),
            None => Box::pin(async {
                Err(TraceError::from(
                    "the jaeger agent's address does not resolve",
                ))
            }),
        }
    }

    fn shutdown(&mut self) {
        if let Some(agent) = self.agent.as_mut() {
            agent.shutdown();
        }
    }
}

/// One JSON object a line: `ts`, `level`, `message`, `target`, `trace_id`, `span_id`, the span's and the event's fields.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Map::new();
        let now =
            time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339);
        line.insert("ts".into(), now.unwrap_or_default().into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        if let Some(span) = ctx.lookup_current() {
            line.insert("span".into(), span.name().into());
            if let Some(data) = span.extensions().get::<OtelData>() {
                let parent = data.parent_cx.span().span_context().clone();
                let trace_id = if parent.is_valid() {
                    Some(parent.trace_id())
                } else {
                    data.builder.trace_id
                };
                line.insert("trace_id".into(), trace_id.map(|id| id.to_string()).into());
                line.insert(
                    "span_id".into(),
                    data.builder.span_id.map(|id| id.to_string()).into(),
                );
            }
        }
        event.record(&mut Fields(&mut line));
        writeln!(writer, "{}", Value::Object(line))
    }
}

struct Fields<'a>(&'a mut Map<String, Value>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0
            .insert(field.name().into(), format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_goes_out_and_comes_back() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = remote(text).span().span_context().clone();
        assert_eq!(
            context.trace_id().to_string(),
            "0af7651916cd43dd8448eb211c80319c"
        );
        assert!(context.is_remote());
        assert!(!remote("nonsense").span().span_context().is_valid());
    }
}
