//! A Jaeger agent: takes the datagrams of `emitBatch` (agent.thrift, compact protocol) and reads the spans in them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{net::UdpSocket, task::JoinSet, time::Instant};

/// Spans leave a service within a second; the machine may be busy, and a consumer may still be joining its group.
const PATIENCE: Duration = Duration::from_secs(120);

/// One span, as Jaeger has it.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) service: String,
    pub(crate) name: String,
    /// 32 hex digits.
    pub(crate) trace: String,
    pub(crate) id: u64,
    /// 0 for the root.
    pub(crate) parent: u64,
    /// What it follows from: trace and span.
    pub(crate) follows: Vec<(String, u64)>,
    /// As text, whatever their type.
    pub(crate) tags: BTreeMap<String, String>,
}

impl Span {
    pub(crate) fn tag(&self, key: &str) -> Option<&str> {
        self.tags.get(key).map(String::as_str)
    }

    pub(crate) fn kind(&self) -> &str {
        self.tag("span.kind").unwrap_or_default()
    }

    pub(crate) fn place(&self) -> (String, u64) {
        (self.trace.clone(), self.id)
    }
}

#[derive(Default)]
struct Taken {
    spans: Vec<Span>,
    packets: Vec<Vec<u8>>,
}

/// The agent; dropped, it listens no more.
pub(crate) struct Agent {
    pub(crate) address: SocketAddr,
    taken: Arc<Mutex<Taken>>,
    _receiving: JoinSet<()>,
}

impl Agent {
    pub(crate) async fn start() -> Agent {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let taken = Arc::new(Mutex::new(Taken::default()));
        let mut receiving = JoinSet::new();
        let into = taken.clone();
        receiving.spawn(async move {
            let mut buffer = vec![0; 65_536];
            loop {
                let (length, _) = socket.recv_from(&mut buffer).await.unwrap();
                let packet = buffer[..length].to_vec();
                let spans = Reader(&packet).batch();
                let mut taken = into.lock().unwrap();
                taken.spans.extend(spans);
                taken.packets.push(packet);
            }
        });
        Agent {
            address,
            taken,
            _receiving: receiving,
        }
    }

    /// What a service is told about it.
    pub(crate) fn section(&self) -> serde_json::Value {
        serde_json::json!({"host": self.address.ip().to_string(), "port": self.address.port()})
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.taken.lock().unwrap().spans.clone()
    }

    /// The datagrams as they came.
    pub(crate) fn packets(&self) -> Vec<Vec<u8>> {
        self.taken.lock().unwrap().packets.clone()
    }

    /// The first span that `fits`, as soon as it has come.
    pub(crate) async fn find(&self, what: &str, fits: impl Fn(&Span) -> bool) -> Span {
        self.wait(what, |spans| spans.iter().find(|span| fits(span)).cloned())
            .await
    }

    /// What `look` finds among the spans, as soon as it finds something.
    pub(crate) async fn wait<T>(&self, what: &str, look: impl Fn(&[Span]) -> Option<T>) -> T {
        let by = Instant::now() + PATIENCE;
        loop {
            let spans = self.spans();
            if let Some(found) = look(&spans) {
                return found;
            }
            assert!(Instant::now() < by, "never: {what}, among {spans:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A value of the compact protocol; a struct has its fields by number.
enum Value {
    Flag(bool),
    Number(i64),
    Double(f64),
    Text(String),
    List(Vec<Value>),
    Struct(BTreeMap<i64, Value>),
}

impl Value {
    fn field(&self, id: i64) -> Option<&Value> {
        match self {
            Value::Struct(fields) => fields.get(&id),
            _ => None,
        }
    }

    fn number(&self, id: i64) -> i64 {
        match self.field(id) {
            Some(Value::Number(number)) => *number,
            _ => panic!("field {id} is no number"),
        }
    }

    fn text(&self, id: i64) -> String {
        match self.field(id) {
            Some(Value::Text(text)) => text.clone(),
            _ => panic!("field {id} is no text"),
        }
    }

    fn list(&self, id: i64) -> &[Value] {
        match self.field(id) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }
}

/// What is left of a datagram.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    /// The one message that an agent understands: `emitBatch(1: Batch)`.
    fn batch(mut self) -> Vec<Span> {
        assert_eq!(self.byte(), 0x82, "the compact protocol");
        assert_eq!(self.byte() & 0x1f, 1, "its first version");
        self.varint();
        assert_eq!(self.text(), "emitBatch");
        let arguments = self.structure();
        assert!(self.0.is_empty(), "something follows the message");
        let batch = arguments.field(1).expect("a batch");
        let service = batch.field(1).expect("a process").text(1);
        batch
            .list(2)
            .iter()
            .map(|span| read(span, &service))
            .collect()
    }

    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().expect("a byte");
        self.0 = rest;
        *first
    }

    fn varint(&mut self) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.byte();
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return value;
            }
            shift += 7;
        }
    }

    fn zigzag(&mut self) -> i64 {
        let value = self.varint();
        (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
    }

    fn text(&mut self) -> String {
        let length = self.varint() as usize;
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(text.to_vec()).expect("UTF-8")
    }

    fn structure(&mut self) -> Value {
        let (mut fields, mut id) = (BTreeMap::new(), 0);
        loop {
            let header = self.byte();
            if header == 0 {
                return Value::Struct(fields);
            }
            id = match header >> 4 {
                0 => self.zigzag(),
                step => id + i64::from(step),
            };
            let value = match header & 0x0f {
                1 => Value::Flag(true),
                2 => Value::Flag(false),
                kind => self.value(kind),
            };
            fields.insert(id, value);
        }
    }

    fn value(&mut self, kind: u8) -> Value {
        match kind {
            1 | 2 => Value::Flag(self.byte() == 1),
            3 => Value::Number(i64::from(self.byte().cast_signed())),
            4..=6 => Value::Number(self.zigzag()),
            7 => {
                let (bytes, rest) = self.0.split_first_chunk().expect("eight bytes");
                self.0 = rest;
                Value::Double(f64::from_le_bytes(*bytes))
            }
            8 => Value::Text(self.text()),
            9 | 10 => {
                let header = self.byte();
                let length = match header >> 4 {
                    15 => self.varint(),
                    length => u64::from(length),
                };
                Value::List((0..length).map(|_| self.value(header & 0x0f)).collect())
            }
            12 => self.structure(),
            kind => panic!("type {kind}"),
        }
    }
}

fn read(span: &Value, service: &str) -> Span {
    let follows = span.list(6).iter().map(|reference| {
        assert_eq!(reference.number(1), 1, "FOLLOWS_FROM");
        let trace = trace(reference.number(3), reference.number(2));
        (trace, reference.number(4).cast_unsigned())
    });
    let tags = span.list(10).iter().map(|tag| {
        let value = [3, 4, 5, 6].into_iter().find_map(|id| tag.field(id));
        (tag.text(1), shown(value.expect("a value")))
    });
    Span {
        service: service.to_owned(),
        name: span.text(5),
        trace: trace(span.number(2), span.number(1)),
        id: span.number(3).cast_unsigned(),
        parent: span.number(4).cast_unsigned(),
        follows: follows.collect(),
        tags: tags.collect(),
    }
}

fn trace(high: i64, low: i64) -> String {
    format!("{:016x}{:016x}", high.cast_unsigned(), low.cast_unsigned())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Flag(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        Value::Text(text) => text.clone(),
        Value::List(_) | Value::Struct(_) => panic!("a tag of tags"),
    }
}
