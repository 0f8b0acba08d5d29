//! Callers that show a certificate, over gRPC and over HTTP.

use std::{net::SocketAddr, path::Path};

use devstack::{
    certs,
    clients::{channel, install_tls_provider},
};
use pbjson_types::Empty;
use serde_json::Value;
use tonic::{
    Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

fn identity(certs: &Path, shown: &str) -> (Vec<u8>, Vec<u8>) {
    let read = |file| std::fs::read(file).unwrap();
    (
        read(certs::cert(certs, shown)),
        read(certs::key(certs, shown)),
    )
}

/// A channel over TLS that shows the certificate of `shown`.
pub(crate) fn grpc(certs: &Path, shown: Option<&str>, address: SocketAddr) -> Channel {
    let ca = Certificate::from_pem(std::fs::read(certs::ca(certs)).unwrap());
    let mut tls = ClientTlsConfig::new().ca_certificate(ca);
    if let Some(shown) = shown {
        let (cert, key) = identity(certs, shown);
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    channel(address, tls).unwrap()
}

/// Calls any method with an empty message: what is refused before it is read, and what is not.
pub(crate) async fn call(channel: &Channel, path: &str) -> Result<Empty, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::try_from(path).unwrap();
    let codec = tonic_prost::ProstCodec::<Empty, Empty>::default();
    let answer = grpc.unary(tonic::Request::new(Empty {}), path, codec).await;
    answer.map(tonic::Response::into_inner)
}

/// An HTTP client over TLS.
pub(crate) struct Web(pub(crate) reqwest::Client);

impl Web {
    /// Shows the certificate of `shown`.
    pub(crate) fn showing(certs: &Path, shown: Option<&str>) -> Web {
        install_tls_provider();
        let ca = std::fs::read(certs::ca(certs)).unwrap();
        let ca = reqwest::Certificate::from_pem(&ca).unwrap();
        let mut client = reqwest::Client::builder().no_proxy().tls_certs_only([ca]);
        if let Some(shown) = shown {
            let (cert, key) = identity(certs, shown);
            let both = [cert, key].concat();
            client = client.identity(reqwest::Identity::from_pem(&both).unwrap());
        }
        Web(client.build().unwrap())
    }

    /// The status and the body; none: it was not let in.
    pub(crate) async fn answer(
        &self,
        door: SocketAddr,
        path: &str,
        body: &Value,
    ) -> Option<(u16, Value)> {
        let request = self.0.post(format!("https://{door}{path}"));
        // whoever says in a header who he is has said nothing
        let request = request
            .header("peer", "operator")
            .header("x-forwarded-client-cert", "Subject=\"CN=operator\"");
        let answer = request.body(body.to_string()).send().await.ok()?;
        let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
        Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// The status; none: it was not let in.
    pub(crate) async fn post(&self, door: SocketAddr, path: &str, body: &Value) -> Option<u16> {
        let answer = self.answer(door, path, body).await;
        answer.map(|(status, _)| status)
    }
}
