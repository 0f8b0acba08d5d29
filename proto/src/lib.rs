//! The contract, generated: one module per proto package, each with its messages, their proto3 JSON and its gRPC client
//! and server. `contract.rs` under `tests/` holds it against the list that existing clients rely on.

mod json;

/// Every message and service of the contract, as `google.protobuf.FileDescriptorSet` bytes; reflection serves it.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The HTTP door of each service as an OpenAPI 3.1 document, JSON.
pub mod openapi {
    pub const CHECKOUT: &str = include_str!(concat!(env!("OUT_DIR"), "/checkout.openapi.json"));
    pub const LOMS: &str = include_str!(concat!(env!("OUT_DIR"), "/loms.openapi.json"));
    pub const NOTIFICATIONS: &str =
        include_str!(concat!(env!("OUT_DIR"), "/notifications.openapi.json"));
}

/// A user's cart and the purchase.
pub mod cart {
    tonic::include_proto!("cart");
    include!(concat!(env!("OUT_DIR"), "/cart.serde.rs"));
}

/// Stock, orders, reservations.
pub mod loms {
    tonic::include_proto!("loms");
    include!(concat!(env!("OUT_DIR"), "/loms.serde.rs"));
}

/// What users were told.
pub mod notifications {
    tonic::include_proto!("notifications");
    include!(concat!(env!("OUT_DIR"), "/notifications.serde.rs"));
}

/// The outside party that knows names and prices.
pub mod product {
    tonic::include_proto!("route256.product");
    include!(concat!(env!("OUT_DIR"), "/route256.product.serde.rs"));
}
