//! The traces that leave the process: a stand-in of Jaeger's agent reads what comes over UDP.

use std::{collections::BTreeMap, net::UdpSocket, time::Duration};

use serde_json::json;

use crate::{
    kafka::{Kafka, event},
    process::{Replica, config_of},
    test_app::eventually,
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

#[tokio::test]
async fn the_batch_links_to_each_publisher_and_the_telling_belongs_to_the_order() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let agent = UdpSocket::bind("127.0.0.1:0").expect("a port");
    agent
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a bound");
    let port = agent.local_addr().expect("an address").port();
    let replica = Replica::start(&config_of(
        &pool,
        &kafka,
        json!({"jaeger": {"host": "127.0.0.1", "port": port}}),
    ));
    let value = event(7, 42, 1, "new", "2026-03-01T10:00:00Z");
    let traceparent = format!("00-{TRACE}-{SPAN}-01");
    kafka
        .send_record(42, Some(value.as_bytes()), Some(&traceparent))
        .await;
    eventually("it is told", async || {
        crate::test_app::count(&pool, "told_at IS NOT NULL").await == 1
    })
    .await;
    // what is left is sent when it stops
    replica.stop();

    let spans = spans(&agent, &["inbox.settle", "delivery.tell"]);
    let settled = &spans["inbox.settle"];
    assert_eq!(settled.links, [(TRACE.to_owned(), SPAN.to_owned())]);
    assert_ne!(settled.trace, TRACE, "caused by it, not part of it");
    assert_eq!(spans["delivery.tell"].trace, TRACE);
}

struct Span {
    trace: String,
    /// Trace and span of each that it follows from.
    links: Vec<(String, String)>,
}

/// Reads what comes until spans of these names are there.
fn spans(agent: &UdpSocket, names: &[&str]) -> BTreeMap<String, Span> {
    let (mut found, mut packet) = (BTreeMap::new(), vec![0; 65_536]);
    while !names.iter().all(|name| found.contains_key(*name)) {
        let read = agent.recv(&mut packet).unwrap_or_else(|error| {
            panic!(
                "no more spans than {:?}: {error}",
                found.keys().collect::<Vec<_>>()
            )
        });
        // emitBatch(1: Batch {1: process, 2: list of spans}), as jaeger.thrift has it
        let message = Compact(&packet[..read]).message();
        for span in message.field(1).field(2).list() {
            let id = |value: &Thrift, low, high| {
                format!(
                    "{:016x}{:016x}",
                    value.field(high).int(),
                    value.field(low).int()
                )
            };
            let links = span
                .field(6)
                .list()
                .iter()
                .map(|link| (id(link, 2, 3), format!("{:016x}", link.field(4).int())));
            let read = Span {
                trace: id(span, 1, 2),
                links: links.collect(),
            };
            found.insert(span.field(5).text(), read);
        }
    }
    found
}

/// A value of Thrift's compact protocol, as far as spans need it.
enum Thrift {
    Nothing,
    Int(i64),
    Text(Vec<u8>),
    List(Vec<Thrift>),
    Struct(BTreeMap<i64, Thrift>),
}

impl Thrift {
    fn field(&self, id: i64) -> &Thrift {
        match self {
            Thrift::Struct(fields) => fields.get(&id).unwrap_or(&Thrift::Nothing),
            _ => &Thrift::Nothing,
        }
    }

    fn list(&self) -> &[Thrift] {
        match self {
            Thrift::List(values) => values,
            _ => &[],
        }
    }

    fn int(&self) -> i64 {
        match self {
            Thrift::Int(value) => *value,
            _ => panic!("no number"),
        }
    }

    fn text(&self) -> String {
        match self {
            Thrift::Text(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            _ => panic!("no text"),
        }
    }
}

struct Compact<'a>(&'a [u8]);

impl Compact<'_> {
    fn message(&mut self) -> Thrift {
        assert_eq!(self.byte(), 0x82, "the compact protocol");
        self.byte();
        self.varint();
        self.value(8);
        self.value(12)
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
            if byte < 0x80 {
                return value;
            }
            shift += 7;
        }
    }

    fn zigzag(&mut self) -> i64 {
        let value = self.varint();
        (value >> 1) as i64 ^ -((value & 1) as i64)
    }

    fn value(&mut self, kind: u8) -> Thrift {
        match kind {
            // of a field; an element of a list would have a byte of its own
            1 | 2 => Thrift::Nothing,
            3..=6 => Thrift::Int(self.zigzag()),
            7 => {
                self.0 = &self.0[8..];
                Thrift::Nothing
            }
            8 => {
                let length = self.varint() as usize;
                let (text, rest) = self.0.split_at(length);
                self.0 = rest;
                Thrift::Text(text.to_vec())
            }
            9 | 10 => {
                let head = self.byte();
                let count = match head >> 4 {
                    15 => self.varint(),
                    short => u64::from(short),
                };
                Thrift::List((0..count).map(|_| self.value(head & 15)).collect())
            }
            12 => {
                let (mut fields, mut id) = (BTreeMap::new(), 0);
                loop {
                    let head = self.byte();
                    if head == 0 {
                        return Thrift::Struct(fields);
                    }
                    id = match head >> 4 {
                        0 => self.zigzag(),
                        delta => id + i64::from(delta),
                    };
                    fields.insert(id, self.value(head & 15));
                }
            }
            other => panic!("unexpected type {other}"),
        }
    }
}
