//! A line of the log: what happened, at which level, in which trace. The same line goes to stdout as JSON and, where it is
//! configured, to Graylog (`gelf`), so that both can be searched for the same words.

mod limit;
mod writer;

use std::{fmt, panic::PanicHookInfo};

use opentelemetry::{Value as Attribute, trace::TraceContextExt as _};
use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    subscriber::Interest,
};
use tracing_opentelemetry::OtelData;
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::{Context, Filter},
    registry::{LookupSpan, SpanRef},
};

pub(crate) use self::{
    limit::Limiter,
    writer::{STDERR, STDOUT, flush},
};

/// One line, before it has a form.
pub(crate) struct Line {
    pub(crate) at: OffsetDateTime,
    pub(crate) level: Level,
    pub(crate) target: &'static str,
    pub(crate) message: String,
    /// The innermost span.
    pub(crate) span: Option<&'static str>,
    /// Its trace and its own id, in hex.
    pub(crate) ids: Option<(String, String)>,
    /// The fields of the spans, from the outermost, and of the event.
    pub(crate) fields: Map<String, Value>,
}

impl Line {
    /// What `event` says inside `span`.
    pub(crate) fn of<S>(event: &Event<'_>, span: Option<SpanRef<'_, S>>) -> Line
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let mut line = Line {
            at: OffsetDateTime::now_utc(),
            level: *event.metadata().level(),
            target: event.metadata().target(),
            message: String::new(),
            span: None,
            ids: None,
            fields: Map::new(),
        };
        if let Some(span) = span {
            line.span = Some(span.name());
            line.ids = span.extensions().get::<OtelData>().and_then(ids);
            for span in span.scope().from_root() {
                if let Some(data) = span.extensions().get::<OtelData>() {
                    let attributes = data.builder.attributes.iter().flatten();
                    let facts = attributes.map(|fact| (fact.key.to_string(), json(&fact.value)));
                    line.fields.extend(facts);
                }
            }
        }
        event.record(&mut line);
        line
    }
}

fn json(value: &Attribute) -> Value {
    match value {
        Attribute::Bool(flag) => (*flag).into(),
        Attribute::I64(number) => (*number).into(),
        Attribute::F64(number) => (*number).into(),
        Attribute::String(text) => text.as_str().into(),
        Attribute::Array(_) => value.to_string().into(),
    }
}

/// The trace and the id of a span, in hex. They are settled after the span was made, when its parent is known.
fn ids(data: &OtelData) -> Option<(String, String)> {
    let parent = data.parent_cx.span().span_context().clone();
    let trace_id = if parent.is_valid() {
        parent.trace_id()
    } else {
        data.builder.trace_id?
    };
    Some((trace_id.to_string(), data.builder.span_id?.to_string()))
}

impl Line {
    /// The line, unless there were too many like it; it says how many were left out.
    pub(crate) fn within(mut self, limiter: &Limiter, metadata: &Metadata<'_>) -> Option<Line> {
        let error = self.fields.get("error").and_then(Value::as_str);
        let left_out = limiter.admit(metadata, error.unwrap_or_default())?;
        if left_out > 0 {
            self.fields.insert("lines.left_out".into(), left_out.into());
        }
        Some(self)
    }

    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => drop(self.fields.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

/// Lines on stdout, one JSON object each: `ts`, `level`, `message`, `target`, `span`, `trace_id`, `span_id`, the fields. A layer
/// of our own: tracing-subscriber's writes down the fields of every span, for lines that most of them never have.
#[derive(Default)]
pub(crate) struct JsonLines(Limiter);

impl<S> Layer<S> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let line = Line::of(event, ctx.event_span(event));
        if let Some(line) = line.within(&self.0, event.metadata()) {
            STDOUT.write(line.level, object(line).to_string());
        }
    }
}

fn object(line: Line) -> Value {
    let mut object = Map::new();
    object.insert(
        "ts".into(),
        line.at.format(&Rfc3339).unwrap_or_default().into(),
    );
    object.insert("level".into(), line.level.as_str().into());
    object.insert("message".into(), line.message.into());
    object.insert("target".into(), line.target.into());
    if let Some(span) = line.span {
        object.insert("span".into(), span.into());
    }
    if let Some((trace_id, span_id)) = line.ids {
        object.insert("trace_id".into(), trace_id.into());
        object.insert("span_id".into(), span_id.into());
    }
    for (name, value) in line.fields {
        object.entry(name).or_insert(value);
    }
    Value::Object(object)
}

/// A panic, as the hook of the process is told of it.
pub(crate) fn panicked(panic: &PanicHookInfo<'_>) {
    let location = panic.location().map(ToString::to_string);
    let (text, location) = (panic_text(panic.payload()), location.unwrap_or_default());
    tracing::error!(panic.message = %text, panic.location = %location, "panicked");
    STDERR.write(Level::ERROR, format!("panicked at {location}: {text}"));
}

/// The text of a panic's payload.
fn panic_text(payload: &(dyn std::any::Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

/// Which lines are wanted. Spans always are: whether a line knows its trace must not depend on the level of the log.
#[derive(Clone)]
pub(crate) struct Wanted(pub(crate) Targets);

impl<S: Subscriber> Filter<S> for Wanted {
    fn enabled(&self, metadata: &Metadata<'_>, ctx: &Context<'_, S>) -> bool {
        is_traced(metadata) || Filter::enabled(&self.0, metadata, ctx)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_traced(metadata) {
            Interest::always()
        } else {
            Filter::<S>::callsite_enabled(&self.0, metadata)
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Filter::<S>::max_level_hint(&self.0).map(|level| level.max(LevelFilter::INFO))
    }
}

fn is_traced(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && *metadata.level() <= Level::INFO
}
