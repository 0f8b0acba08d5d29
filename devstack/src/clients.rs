//! Callers of a stack, as anyone outside has them: gRPC over TLS with the stack's authority, JSON over HTTP.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use proto::{
    cart::cart_client::CartClient,
    loms::loms_client::LomsClient,
    notifications::{Date, notifications_client::NotificationsClient},
    product::product_service_client::ProductServiceClient,
};
use serde_json::Value;
use time::OffsetDateTime;
use tonic::{
    Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::{ErrorInfo, StatusExt as _};

use crate::{certs, stack::Stack};

/// No call of a walk or a replay takes longer; a stack that hangs must not hang its caller.
const CALL_BOUND: Duration = Duration::from_secs(30);

/// One caller of each door. Cheap to clone.
#[derive(Clone)]
pub struct Clients {
    pub cart: CartClient<Channel>,
    pub loms: LomsClient<Channel>,
    pub notifications: NotificationsClient<Channel>,
    pub products: ProductServiceClient<Channel>,
    pub http: Http,
}

impl Clients {
    /// Callers that connect with their first call; the one of LOMS is the operator.
    pub fn new(stack: &Stack) -> Result<Clients> {
        let ca = Certificate::from_pem(std::fs::read(stack.ca()).context("read the authority")?);
        let stranger = ClientTlsConfig::new().ca_certificate(ca);
        let operator = stranger.clone().identity(operator(stack.certs())?);
        let grpc = |service: &str, tls| channel(stack.service(service)?.grpc(), tls);
        Ok(Clients {
            cart: CartClient::new(grpc("checkout", stranger.clone())?),
            loms: LomsClient::new(grpc("loms", operator)?),
            notifications: NotificationsClient::new(grpc("notifications", stranger.clone())?),
            products: ProductServiceClient::new(channel(stack.products(), stranger)?),
            http: Http {
                client: http_client()?,
                checkout: stack.service("checkout")?.http(),
                loms: stack.service("loms")?.http(),
                notifications: stack.service("notifications")?.http(),
            },
        })
    }
}

/// Who may book deliveries.
fn operator(certs: &Path) -> Result<Identity> {
    let read =
        |file: PathBuf| std::fs::read(&file).with_context(|| format!("read {}", file.display()));
    Ok(Identity::from_pem(
        read(certs::cert(certs, certs::OPERATOR))?,
        read(certs::key(certs, certs::OPERATOR))?,
    ))
}

/// A channel that connects with its first call.
pub fn channel(address: SocketAddr, tls: ClientTlsConfig) -> Result<Channel> {
    Ok(Endpoint::from_shared(format!("https://{address}"))?
        .tls_config(tls)?
        .timeout(CALL_BOUND)
        .connect_lazy())
}

/// An HTTP caller; the doors speak plaintext, but the client wants a provider of TLS to be built.
pub fn http_client() -> Result<reqwest::Client> {
    install_tls_provider();
    reqwest::Client::builder()
        .timeout(CALL_BOUND)
        .no_proxy()
        .build()
        .context("build an HTTP client")
}

/// Chooses ring for every TLS connection of the process; a second call changes nothing.
pub fn install_tls_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Which service a route belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Checkout,
    Loms,
    Notifications,
}

/// The HTTP doors.
#[derive(Clone)]
pub struct Http {
    client: reqwest::Client,
    checkout: SocketAddr,
    loms: SocketAddr,
    notifications: SocketAddr,
}

/// What an HTTP door answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Answer {
    /// `reason` of the first detail that has one.
    pub fn reason(&self) -> Option<&str> {
        self.body["details"]
            .as_array()?
            .iter()
            .find_map(|detail| detail["reason"].as_str())
    }
}

impl Http {
    /// `http://host:port` of a door and a path there.
    pub fn url(&self, door: Door, path: &str) -> String {
        let address = match door {
            Door::Checkout => self.checkout,
            Door::Loms => self.loms,
            Door::Notifications => self.notifications,
        };
        format!("http://{address}{path}")
    }

    /// POST of a JSON body.
    pub async fn post(&self, door: Door, path: &str, body: &Value) -> Result<Answer> {
        self.post_text(door, path, body.to_string()).await
    }

    /// POST of any body at all.
    pub async fn post_text(&self, door: Door, path: &str, body: String) -> Result<Answer> {
        let request = self
            .client
            .post(self.url(door, path))
            .header("content-type", "application/json")
            .body(body);
        answer(request).await
    }

    /// GET.
    pub async fn get(&self, door: Door, path: &str) -> Result<Answer> {
        answer(self.client.get(self.url(door, path))).await
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Result<Answer> {
    let response = request.send().await.context("call over HTTP")?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.context("read an answer over HTTP")?;
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Ok(Answer {
        status,
        headers,
        body,
    })
}

/// The stable reason of a refusal, with what it says about it.
pub fn error_info(status: &Status) -> Option<ErrorInfo> {
    status.get_details_error_info()
}

/// The stable reason of a refusal; empty when it has none.
pub fn reason(status: &Status) -> String {
    error_info(status)
        .map(|info| info.reason)
        .unwrap_or_default()
}

/// Days around now: yesterday and tomorrow, so that midnight in the middle of a run changes nothing.
pub fn period_around_now() -> (Date, Date) {
    let date = |at: OffsetDateTime| Date {
        year: at.year(),
        month: u8::from(at.month()).into(),
        day: at.day().into(),
    };
    let now = OffsetDateTime::now_utc();
    (
        date(now - time::Duration::DAY),
        date(now + time::Duration::DAY),
    )
}
