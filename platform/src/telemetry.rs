//! Traces, and the subscriber of the process. A tracer provider is always installed, so that every answer has a trace id; spans
//! leave the process only when `jaeger.host` is set. The only file that names opentelemetry-jaeger.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use opentelemetry::{
    KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanContext, TraceContextExt as _, TracerProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    export::trace::{ExportResult, SpanData, SpanExporter},
    propagation::TraceContextPropagator,
    runtime,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Config, Sampler, TracerProvider},
};
use prometheus::IntCounter;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tracing::{Span, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{
    Layer as _, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{
    config::{GraylogConfig, JaegerConfig, LogConfig},
    error::StartError,
    gelf,
    grpc::registered,
    log::{self, JsonLines, STDOUT, Wanted},
    state_log::StateLog,
};

/// The part of `shutdown_grace` that the traces and the log have.
pub(crate) const FLUSH_BOUND: Duration = Duration::from_secs(1);
/// Spans wait so long for others to share a packet.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// Spans of one export: about two packets, more would only be split again and again.
const BATCH_SPANS: usize = 64;
/// Spans that wait for the agent; one more is lost.
const QUEUED_SPANS: usize = 8_192;
/// Events and links of one span: with these it still fits into a packet.
const SPAN_EVENTS: u32 = 16;
/// See `SPAN_EVENTS`.
const SPAN_LINKS: usize = 64;

/// Keeps the exporter alive; [`Telemetry::shutdown`] sends what is left.
pub struct Telemetry {
    traces: Option<TracerProvider>,
    lines: Option<gelf::Flush>,
}

/// Installs the subscriber of the process. A second call in one process (tests) keeps the first.
///
/// # Errors
/// A log level or a ratio that is none.
pub fn init(
    service: &'static str,
    log: &LogConfig,
    jaeger: &JaegerConfig,
    graylog: &GraylogConfig,
) -> Result<Telemetry, StartError> {
    let wanted = log.level.parse::<Targets>().map_err(|error| {
        StartError::new(
            format!("log.level = {:?}: {error}", log.level),
            "write error, warn, info or debug",
        )
    })?;
    let wanted = Wanted(without_noise(wanted));
    if !(0.0..=1.0).contains(&jaeger.sample_ratio) {
        return Err(StartError::new(
            format!("jaeger.sample_ratio = {}", jaeger.sample_ratio),
            "write a number from 0 to 1",
        ));
    }
    if tracing::dispatcher::has_been_set() {
        return Ok(Telemetry {
            traces: None,
            lines: None,
        });
    }
    let provider = provider(service, jaeger);
    // spans are made whatever the log level: the trace id of an answer does not depend on it
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_location(false)
        .with_threads(false)
        // two clock readings at each poll of each span, for attributes that nobody looks at
        .with_tracked_inactivity(false)
        .with_filter(LevelFilter::INFO);
    let lines = JsonLines::default().with_filter(wanted.clone());
    let (gelf, flush) = (!graylog.host.is_empty())
        .then(|| gelf::layer(service, graylog))
        .unzip();
    let installed = tracing_subscriber::registry()
        .with(spans)
        .with(lines)
        .with(gelf.map(|layer| layer.with_filter(wanted)))
        .try_init();
    if installed.is_ok() {
        STDOUT.count_lost(service);
        let panics = registered(IntCounter::new(
            format!("{service}_counter_panics_total"),
            "Panics: of handlers, which then answer INTERNAL, and of anything else.",
        ));
        std::panic::set_hook(Box::new(move |panic| {
            panics.inc();
            log::panicked(panic);
        }));
    }
    Ok(Telemetry {
        traces: Some(provider),
        lines: flush,
    })
}

fn provider(service: &'static str, jaeger: &JaegerConfig) -> TracerProvider {
    // without an exporter spans only carry their ids
    let sampler = if jaeger.host.is_empty() {
        Sampler::AlwaysOff
    } else {
        Sampler::TraceIdRatioBased(jaeger.sample_ratio)
    };
    let config = Config::default()
        .with_resource(Resource::new([KeyValue::new("service.name", service)]))
        .with_sampler(Sampler::ParentBased(Box::new(sampler)))
        .with_max_events_per_span(SPAN_EVENTS)
        .with_max_links_per_span(SPAN_LINKS as u32);
    let mut builder = TracerProvider::builder().with_config(config);
    if !jaeger.host.is_empty() {
        let lost = lost_spans(service).clone();
        // said by the queue for each span that finds it full, inside the call that the span belongs to: counted, not logged
        opentelemetry::global::set_error_handler(move |_| lost.inc()).ok();
        let batches = BatchConfigBuilder::default()
            .with_scheduled_delay(BATCH_DELAY)
            .with_max_export_batch_size(BATCH_SPANS)
            .with_max_queue_size(QUEUED_SPANS)
            .build();
        let exporter = AgentExporter(Arc::new(Mutex::new(Agent::new(service, jaeger))));
        let processor = BatchSpanProcessor::builder(exporter, runtime::Tokio)
            .with_batch_config(batches)
            .build();
        builder = builder.with_span_processor(processor);
    }
    builder.build()
}

/// h2 warns of each odd frame that a peer sends: millions of lines in seconds, which say nothing of
/// the service.
fn without_noise(wanted: Targets) -> Targets {
    if wanted.iter().any(|(target, _)| target.starts_with("h2")) {
        return wanted;
    }
    wanted.with_target("h2", LevelFilter::ERROR)
}

impl Telemetry {
    /// Sends what is left, for at most `FLUSH_BOUND`: neither the exporter nor Graylog has a bound of its own.
    pub async fn shutdown(self) {
        let traces = tokio::task::spawn_blocking(move || drop(self.traces));
        let lines = async {
            if let Some(lines) = self.lines {
                lines.flush().await;
            }
        };
        let flushed = async { tokio::join!(traces, lines) };
        if timeout(FLUSH_BOUND, flushed).await.is_err() {
            tracing::warn!("traces or log lines were not sent in time");
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

/// Whether somebody records the trace that `traceparent` belongs to.
pub fn is_sampled(traceparent: &str) -> bool {
    // asked of every event and of every call of a batch: the last bit of the flags says it, nothing else has to be read
    let flags = traceparent.get(53..55).unwrap_or_default();
    u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1)
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

/// Links `span` to the calls that it serves, as many as one span may have links: it belongs to no one of their traces.
pub fn link_to_calls<'a>(span: &Span, traceparents: impl Iterator<Item = &'a str>) {
    let recorded = traceparents.filter(|call| is_sampled(call));
    for call in recorded.take(SPAN_LINKS) {
        link_to(span, call);
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
type Jaeger = opentelemetry_jaeger::Exporter;

static SPANS: StateLog = StateLog::new("spans lost", "spans are sent again");

/// Between two looks for an agent that was not found.
const AGENT_RETRY: Duration = Duration::from_secs(30);
/// For a name to resolve.
const RESOLVE_BOUND: Duration = Duration::from_secs(5);

/// Jaeger's agent over UDP, found when there is something to send: its host name may resolve only later, and to another
/// address when it comes back.
struct Agent {
    service: &'static str,
    address: (String, u16),
    exporter: Option<Jaeger>,
    next_look: Instant,
}

impl Agent {
    fn new(service: &'static str, config: &JaegerConfig) -> Agent {
        Agent {
            service,
            address: (config.host.clone(), config.port),
            exporter: None,
            next_look: Instant::now(),
        }
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        let mut lost = batch.len();
        if let Err(cause) = self.try_send(batch, &mut lost).await {
            lost_spans(self.service).inc_by(lost as u64);
            let (host, port) = &self.address;
            SPANS.failed(&format_args!("{host}:{port}: {cause}"));
        } else {
            SPANS.works();
        }
    }

    async fn try_send(&mut self, batch: Vec<SpanData>, lost: &mut usize) -> Result<(), String> {
        let mut exporter = match self.exporter.take() {
            Some(exporter) => exporter,
            None => self.find().await?,
        };
        if exporter.export(batch.clone()).await.is_ok() {
            self.exporter = Some(exporter);
            return Ok(());
        }
        // a span that is larger than a packet, or a packet that was refused, must not cost the others
        let mut cause = None;
        *lost = 0;
        for span in batch {
            if let Err(error) = exporter.export(vec![span]).await {
                cause = Some(error.to_string());
                *lost += 1;
            }
        }
        cause.map_or(Ok(()), Err)
    }

    /// Resolves the name without holding up a thread of the runtime, which the exporter itself would.
    async fn find(&mut self) -> Result<Jaeger, String> {
        if Instant::now() < self.next_look {
            return Err("the agent was not found".into());
        }
        let found = self.resolve_and_open().await;
        if found.is_err() {
            self.next_look = Instant::now() + AGENT_RETRY;
        }
        found
    }

    async fn resolve_and_open(&self) -> Result<Jaeger, String> {
        let (host, port) = (self.address.0.as_str(), self.address.1);
        let found = timeout(RESOLVE_BOUND, tokio::net::lookup_host((host, port))).await;
        let found = found.map_err(|_| "the name does not resolve in time".to_owned())?;
        let found: Vec<_> = found.map_err(|error| error.to_string())?.collect();
        // of localhost's two addresses an agent listens on the older one, if on one only
        let preferred = found.iter().find(|address| address.is_ipv4());
        let address = preferred
            .or(found.first())
            .ok_or("the name has no address")?;
        #[expect(deprecated, reason = "as above")]
        let pipeline = opentelemetry_jaeger::new_agent_pipeline()
            .with_service_name(self.service)
            .with_endpoint(address.to_string())
            // passes links with large frames whole; larger batches are split
            .with_max_packet_size(9_000)
            .with_auto_split_batch(true);
        pipeline
            .build_sync_agent_exporter()
            .map_err(|error| error.to_string())
    }
}

/// The agent for the batch processor, which wants futures that borrow nothing.
struct AgentExporter(Arc<Mutex<Agent>>);

impl fmt::Debug for AgentExporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentExporter").finish_non_exhaustive()
    }
}

impl SpanExporter for AgentExporter {
    fn export(&mut self, batch: Vec<SpanData>) -> BoxFuture<'static, ExportResult> {
        let agent = self.0.clone();
        Box::pin(async move {
            agent.lock().await.send(batch).await;
            Ok(())
        })
    }
}

fn lost_spans(service: &'static str) -> &'static IntCounter {
    static LOST: OnceLock<IntCounter> = OnceLock::new();
    LOST.get_or_init(|| {
        registered(IntCounter::new(
            format!("{service}_counter_spans_lost_total"),
            "Spans that were not sent: the queue was full, or the agent was not there.",
        ))
    })
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
