//! A request on its way from JSON to protobuf: each value is written as bytes of the message as
//! soon as it is read.

use std::fmt;

use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde::de::{
    Deserialize as _, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess,
    Visitor,
};
use serde_json::value::RawValue;

use super::{ENTRIES, invalid, number, wire::Wire};
use crate::error::{Fault, LISTED, Violation};

#[derive(Default)]
pub(super) struct Request {
    message: Wire,
    /// The path of the value that is being read: `items[3].count`.
    place: String,
    violations: Vec<Violation>,
    /// Violations beyond those that are listed.
    more: usize,
    /// Why the rest of the body is not read.
    stopped: Option<Fault>,
}

impl Request {
    /// Reads all of `json`.
    ///
    /// # Errors
    /// It is no JSON. That it is a wrong request is said by [`Request::finish`].
    pub(super) fn read(&mut self, shape: &MessageDescriptor, json: &str) -> serde_json::Result<()> {
        let mut reader = serde_json::Deserializer::from_str(json);
        if !json.starts_with('{') {
            IgnoredAny::deserialize(&mut reader)?;
            reader.end()?;
            self.stopped = Some(invalid("the body must be a JSON object"));
            return Ok(());
        }
        let body = Body {
            request: self,
            shape,
        };
        match reader.deserialize_map(body) {
            Err(_) if self.stopped.is_some() => Ok(()),
            read => read.and_then(|()| reader.end()),
        }
    }

    /// The message's bytes.
    ///
    /// # Errors
    /// Every field that is wrong, or why the body was not read to its end.
    pub(super) fn finish(self) -> Result<Vec<u8>, Fault> {
        match self.stopped {
            Some(fault) => Err(fault),
            None if self.violations.is_empty() => Ok(self.message.into_bytes()),
            None => Err(Fault::invalid_and_more(self.violations, self.more)),
        }
    }

    /// Notes that the value at `place` is not what it must be.
    fn refuse(&mut self, description: impl Into<String>) {
        if self.violations.len() < LISTED {
            self.violations.push(Violation {
                field: self.place.clone(),
                description: description.into(),
            });
        } else {
            self.more += 1;
        }
    }

    /// Does `work` a step further down the path.
    fn within<T>(&mut self, step: fmt::Arguments<'_>, work: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.place.len();
        // a String takes whatever is written
        let _ = fmt::write(&mut self.place, step);
        let done = work(self);
        self.place.truncate(outer);
        done
    }

    fn within_field<T>(&mut self, name: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let dot = if self.place.is_empty() { "" } else { "." };
        self.within(format_args!("{dot}{name}"), work)
    }
}

/// The body itself.
struct Body<'a> {
    request: &'a mut Request,
    shape: &'a MessageDescriptor,
}

impl<'de> Visitor<'de> for Body<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        fields(self.request, self.shape, map)
    }
}

fn fields<'de, A: MapAccess<'de>>(
    request: &mut Request,
    shape: &MessageDescriptor,
    mut map: A,
) -> Result<(), A::Error> {
    let mut seen = Vec::new();
    while let Some(key) = map.next_key_seed(Key(shape))? {
        match key {
            Name::Of(field) if seen.contains(&field.number()) => {
                request.within_field(field.name(), |request| request.refuse("must be given once"));
                map.next_value::<IgnoredAny>()?;
            }
            Name::Of(field) => {
                seen.push(field.number());
                request.within_field(field.name(), |request| {
                    map.next_value_seed(Value::of(request, &field))
                })?;
            }
            Name::Misspelt { written, right } => {
                let description = format!("must be spelled {}", right.json_name());
                request.within_field(&written, |request| request.refuse(description));
                map.next_value::<IgnoredAny>()?;
            }
            Name::Unknown => drop(map.next_value::<IgnoredAny>()?),
        }
    }
    Ok(())
}

/// What the key of an object says.
enum Name {
    Of(FieldDescriptor),
    /// Another field's name but for upper and lower case. Ignored, it would be order 0 for
    /// `orderId`.
    Misspelt {
        written: String,
        right: FieldDescriptor,
    },
    Unknown,
}

struct Key<'a>(&'a MessageDescriptor);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Name;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Name, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Name;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, key: &str) -> Result<Name, E> {
        let known = self.0.get_field_by_json_name(key);
        if let Some(field) = known.or_else(|| self.0.get_field_by_name(key)) {
            return Ok(Name::Of(field));
        }
        let misspelt = self.0.fields().find(|field| {
            key.eq_ignore_ascii_case(field.json_name()) || key.eq_ignore_ascii_case(field.name())
        });
        Ok(misspelt.map_or(Name::Unknown, |right| Name::Misspelt {
            written: key.to_owned(),
            right,
        }))
    }
}

/// The value of a field, or one entry of it.
struct Value<'a> {
    request: &'a mut Request,
    field: &'a FieldDescriptor,
    is_entry: bool,
}

impl<'a> Value<'a> {
    fn of(request: &'a mut Request, field: &'a FieldDescriptor) -> Self {
        Value {
            request,
            field,
            is_entry: false,
        }
    }

    fn is_list(&self) -> bool {
        self.field.is_list() && !self.is_entry
    }

    /// The message that an object is here.
    fn message(&self) -> Option<MessageDescriptor> {
        message(&self.field.kind()).filter(|_| !self.is_list())
    }

    fn refuse(self) {
        self.request.refuse(if self.is_list() {
            "must be an array".to_owned()
        } else {
            expected(&self.field.kind())
        });
    }

    /// Null is a field that is not there; an entry cannot be that.
    fn null(self) {
        if self.is_entry {
            self.refuse();
        }
    }

    fn scalar(self, json: &str) {
        let text = match json.as_bytes() {
            b"null" => return self.null(),
            [b'"', ..] => serde_json::from_str::<String>(json).ok(),
            _ => None,
        };
        let (kind, message) = (self.field.kind(), &mut self.request.message);
        match (integers(&kind), kind, text) {
            (Some(range), _, text) => {
                let integer = match text {
                    Some(text) => number::of_string(&text),
                    None => number::of_number(json),
                };
                match integer.filter(|integer| range.contains(integer)) {
                    Some(integer) => message.integer(self.field, integer),
                    None => self.refuse(),
                }
            }
            (None, Kind::String, Some(text)) => message.text(self.field, &text),
            (None, Kind::Bool, None) if json == "true" => message.integer(self.field, 1),
            (None, Kind::Bool, None) if json == "false" => message.integer(self.field, 0),
            _ => self.refuse(),
        }
    }
}

/// A message that is an object with its fields; those of google.protobuf and maps are written
/// otherwise.
fn message(kind: &Kind) -> Option<MessageDescriptor> {
    let shape = kind.as_message()?;
    let is_special = shape.package_name() == "google.protobuf" || shape.is_map_entry();
    (!is_special).then(|| shape.clone())
}

/// The integers of a kind, if it is one of those that requests have.
fn integers(kind: &Kind) -> Option<std::ops::RangeInclusive<i128>> {
    match kind {
        Kind::Int32 => Some(i128::from(i32::MIN)..=i128::from(i32::MAX)),
        Kind::Int64 => Some(i128::from(i64::MIN)..=i128::from(i64::MAX)),
        Kind::Uint32 => Some(0..=i128::from(u32::MAX)),
        Kind::Uint64 => Some(0..=i128::from(u64::MAX)),
        _ => None,
    }
}

fn expected(kind: &Kind) -> String {
    match (integers(kind), kind) {
        (Some(range), _) => format!("must be an integer, {} to {}", range.start(), range.end()),
        (None, Kind::String) => "must be a string".into(),
        (None, Kind::Bool) => "must be true or false".into(),
        (None, Kind::Message(_)) if message(kind).is_some() => "must be an object".into(),
        (None, _) => "cannot be sent as JSON".into(),
    }
}

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        if self.is_list() || self.message().is_some() {
            return json.deserialize_any(self);
        }
        // the text of a number, since serde_json makes floats of those with an exponent
        let text = <&RawValue>::deserialize(json)?;
        self.scalar(text.get());
        Ok(())
    }
}

/// A list or a message; its other types of value are refused.
impl<'de> Visitor<'de> for Value<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let Some(shape) = self.message() else {
            IgnoredAny.visit_map(map)?;
            self.refuse();
            return Ok(());
        };
        let start = self.request.message.begin(self.field);
        fields(self.request, &shape, map)?;
        self.request.message.end(start);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if !self.is_list() {
            IgnoredAny.visit_seq(seq)?;
            self.refuse();
            return Ok(());
        }
        let Value { request, field, .. } = self;
        for index in 0..ENTRIES {
            let entry = request.within(format_args!("[{index}]"), |request| {
                seq.next_element_seed(Value {
                    request,
                    field,
                    is_entry: true,
                })
            });
            if entry?.is_none() {
                return Ok(());
            }
        }
        if seq.next_element::<IgnoredAny>()?.is_none() {
            return Ok(());
        }
        request.stopped = Some(Fault::invalid(vec![Violation {
            field: request.place.clone(),
            description: format!("must have at most {ENTRIES} entries"),
        }]));
        Err(A::Error::custom("stopped"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.refuse();
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.refuse();
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.refuse();
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.refuse();
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        self.refuse();
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.null();
        Ok(())
    }
}
