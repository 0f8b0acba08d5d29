//! A message as protobuf writes it (Protocol Buffers, "Encoding"), a field at a time.

use prost_reflect::FieldDescriptor;

#[derive(Default)]
pub(super) struct Wire(Vec<u8>);

#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    Length = 2,
}

impl Wire {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// An integer, an enum's number or a bool. A negative one is ten bytes of two's complement.
    pub(super) fn integer(&mut self, field: &FieldDescriptor, value: i128) {
        self.key(field, WireType::Varint);
        varint(value as u64, &mut self.0);
    }

    pub(super) fn text(&mut self, field: &FieldDescriptor, text: &str) {
        self.key(field, WireType::Length);
        varint(text.len() as u64, &mut self.0);
        self.0.extend_from_slice(text.as_bytes());
    }

    /// Begins a message in the message; the result is for [`Wire::end`].
    pub(super) fn begin(&mut self, field: &FieldDescriptor) -> usize {
        self.key(field, WireType::Length);
        self.0.len()
    }

    /// Puts the length of what has been written since `start` before it: a byte, as a rule.
    pub(super) fn end(&mut self, start: usize) {
        let mut length = Vec::new();
        varint((self.0.len() - start) as u64, &mut length);
        self.0.splice(start..start, length);
    }

    fn key(&mut self, field: &FieldDescriptor, wire_type: WireType) {
        let key = u64::from(field.number()) << 3 | wire_type as u64;
        varint(key, &mut self.0);
    }
}

fn varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}
