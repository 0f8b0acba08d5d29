//! Calls to neighbours: one channel each, built once, connected when needed, with TLS, a deadline per call that never
//! passes the caller's own, the trace context, and a counter by method and code.

use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    sync::{LazyLock, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response};
use prometheus::{CounterVec, Opts};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::Service;
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    certificates::{Files, PemFile},
    connect::{ClientTls, Connect, ConnectOnce},
    deadline::timeout_of,
    error::{Code, Fault, StartError, go_name},
    grpc::{Deadline, code_of, record_code, registered},
    tasks::Tasks,
    telemetry,
};

/// Two timers of one call end so close together.
const TIMER_SLACK: Duration = Duration::from_millis(5);

/// A service that this one calls.
#[derive(Clone, Debug)]
pub struct Neighbour {
    pub name: &'static str,
    /// `host:port`
    pub address: String,
    /// None means plaintext.
    pub tls: Option<UpstreamTls>,
    /// How often the files of certificates are looked at; the next connection shows what is new.
    pub reload_every: Duration,
    pub connect_timeout: Duration,
    /// The longest that one call may take.
    pub timeout: Duration,
}

/// How a service that is called is known.
#[derive(Clone, Debug)]
pub struct UpstreamTls {
    /// The CA that its certificate is verified with, and the setting that names it.
    pub ca: (&'static str, PathBuf),
    /// The certificate and key that are shown to a service that asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that its certificate is for; the host of its address if there is none.
    pub server_name: Option<String>,
}

impl Neighbour {
    fn tls(&self, service: &'static str, host: &str) -> Result<Option<ClientTls>, StartError> {
        let Some(tls) = &self.tls else {
            return Ok(None);
        };
        let (setting, path) = &tls.ca;
        let file = |setting, path: &PathBuf| PemFile {
            setting,
            path: path.clone(),
        };
        let identity = tls.identity.as_ref();
        let files = Files {
            identity: identity.map(|(cert, key)| (file("tls.cert", cert), file("tls.key", key))),
            ca: Some(file(setting, path)),
        };
        let host = tls.server_name.as_deref().unwrap_or(host);
        ClientTls::load(service, files, host).map(Some)
    }
}

/// A channel to a [`Neighbour`] for the generated clients; clones share the connection.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    endpoint: Endpoint,
    connect: Connect,
    /// Of a client that is one connection: that it is no more.
    closed: CancellationToken,
    timeout: Duration,
    name: &'static str,
    calls: CounterVec,
}

impl Client {
    /// A worker among `tasks` watches the files.
    ///
    /// # Errors
    /// An address that is none, or a certificate file that is missing or no good.
    pub fn new(
        service: &'static str,
        neighbour: &Neighbour,
        tasks: &Tasks,
    ) -> Result<Client, StartError> {
        let wrong = |cause: String| {
            StartError::new(
                format!(
                    "services.{} = {:?}: {cause}",
                    neighbour.name, neighbour.address
                ),
                "write it as host:port",
            )
        };
        let (host, port) = neighbour
            .address
            .rsplit_once(':')
            .ok_or_else(|| wrong("no port".into()))?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(wrong("not host:port".into()));
        }
        let tls = neighbour.tls(service, host)?;
        let connect = Connect::new(neighbour, tls.clone());
        let address = |scheme: &str| format!("{scheme}://{}", neighbour.address);
        let is_no_uri = |error: &dyn std::fmt::Display| wrong(error.to_string());
        let mut endpoint = Endpoint::from_shared(address("http"))
            .map_err(|error| is_no_uri(&error))?
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_timeout(Duration::from_secs(5));
        if let Some(tls) = tls {
            tls.watch(neighbour.reload_every, tasks);
            // the channel would do a TLS of its own by the address; calls say what it is all the same
            let origin = address("https").parse();
            endpoint = endpoint.origin(origin.map_err(|error| is_no_uri(&error))?);
        }
        Ok(Client {
            channel: endpoint.connect_with_connector_lazy(connect.clone()),
            endpoint,
            connect,
            closed: CancellationToken::new(),
            timeout: neighbour.timeout,
            name: neighbour.name,
            calls: outbound_calls(service),
        })
    }

    /// A client whose calls all go over one connection, which is made now: what is known of its
    /// other end stays true as long as it lives.
    ///
    /// # Errors
    /// UNAVAILABLE: there is no connection; DEADLINE_EXCEEDED: there is none in time.
    pub async fn one_connection(&self, deadline: Deadline) -> Result<Client, Status> {
        let closed = CancellationToken::new();
        let once = ConnectOnce::new(self.connect.clone(), closed.clone());
        let allowed = self.timeout.min(deadline.remaining());
        let connecting = self.endpoint.connect_with_connector(once);
        match tokio::time::timeout(allowed, connecting).await {
            Ok(Ok(channel)) => Ok(Client {
                channel,
                closed,
                ..self.clone()
            }),
            Ok(Err(error)) => {
                let cause = format!("is not to be reached: {:#}", anyhow::Error::from(error));
                Err(self.fault(Code::Unavailable, &cause))
            }
            Err(_) => Err(self.late()),
        }
    }

    /// Whether this one connection is no more, as far as it is known.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    fn fault(&self, code: Code, what: &str) -> Status {
        Fault::new(code, format!("{} {what}", self.name)).into()
    }

    fn late(&self) -> Status {
        self.fault(Code::DeadlineExceeded, "did not answer in time")
    }

    /// A request that carries what is left of the time.
    pub fn request<M>(&self, deadline: Deadline, message: M) -> tonic::Request<M> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.timeout.min(deadline.remaining()));
        request
    }

    /// Waits for `answer` no longer than the caller and this neighbour's time-out allow.
    ///
    /// # Errors
    /// The neighbour's status; DEADLINE_EXCEEDED when it is late, UNAVAILABLE when the call broke off before.
    pub async fn call<T>(
        &self,
        deadline: Deadline,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        let (began, allowed) = (Instant::now(), self.timeout.min(deadline.remaining()));
        match tokio::time::timeout(allowed, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            // a server (tonic's among them) answers an expired grpc-timeout with CANCELLED; hyper says the same of a
            // request that a connection about to close did not take
            Ok(Err(status)) if status.code() == tonic::Code::Cancelled => {
                let is_late = began.elapsed() + TIMER_SLACK >= allowed;
                Err(if is_late {
                    self.late()
                } else {
                    self.fault(Code::Unavailable, "broke off the call")
                })
            }
            Ok(Err(status)) => Err(status),
            Err(_) => Err(self.late()),
        }
    }
}

impl Service<Request<Body>> for Client {
    type Response = Response<Body>;
    type Error = tonic::transport::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, tonic::transport::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let method = request.uri().path().to_owned();
        let span = tracing::info_span!("grpc.client", otel.name = %method, otel.kind = "client", otel.status_code = Empty,
            rpc.method = %method, rpc.code = Empty);
        let parent = span.in_scope(telemetry::traceparent);
        if let Some(value) = parent.and_then(|text| HeaderValue::from_str(&text).ok()) {
            request.headers_mut().insert("traceparent", value);
        }
        let mut outcome = Outcome {
            calls: self.calls.clone(),
            neighbour: self.name,
            method,
            due: timeout_of(request.headers()).map(|allowed| Instant::now() + allowed),
            code: None,
        };
        let (answer, closed) = (self.channel.call(request), self.closed.clone());
        let counted = async move {
            let answer = answer.await.inspect_err(|error| {
                // a call whose time is over says nothing of its connection
                if !is_late(error) {
                    closed.cancel();
                }
            });
            outcome.end(match &answer {
                Ok(response) => code_of(response.headers()),
                Err(_) => tonic::Code::Unavailable,
            });
            answer
        };
        Box::pin(counted.instrument(span))
    }
}

fn is_late(error: &tonic::transport::Error) -> bool {
    let mut causes = anyhow::Chain::new(error);
    causes.any(|cause| cause.is::<tonic::TimeoutExpired>())
}

/// What became of a call, counted when it is over: also of one that nobody waits for any more.
struct Outcome {
    calls: CounterVec,
    neighbour: &'static str,
    method: String,
    due: Option<Instant>,
    code: Option<tonic::Code>,
}

impl Outcome {
    fn end(&mut self, code: tonic::Code) {
        self.code = Some(code);
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        let late = self.due.is_some_and(|due| Instant::now() >= due);
        let code = self.code.unwrap_or(if late {
            tonic::Code::DeadlineExceeded
        } else {
            tonic::Code::Cancelled
        });
        record_code(&Span::current(), code);
        self.calls
            .with_label_values(&[self.neighbour, &self.method, go_name(code)])
            .inc();
    }
}

fn outbound_calls(service: &'static str) -> CounterVec {
    static KNOWN: LazyLock<Mutex<HashMap<&'static str, CounterVec>>> =
        LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let opts = || {
        Opts::new(
            format!("{service}_counter_outbound_calls_total"),
            "Calls to neighbours, by how they ended.",
        )
    };
    known
        .entry(service)
        .or_insert_with(|| registered(CounterVec::new(opts(), &["neighbour", "method", "status"])))
        .clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `call` makes of CANCELLED, said at once to a caller who waits so long.
    async fn cancelled_within(allowed: Duration) -> tonic::Code {
        let neighbour = Neighbour {
            name: "next",
            address: "127.0.0.1:1".into(),
            tls: None,
            reload_every: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(60),
        };
        let client = Client::new("cancelling", &neighbour, &Tasks::new()).unwrap();
        let answer = async { Err::<tonic::Response<()>, _>(Status::cancelled("closed")) };
        let answer = client.call(Deadline::after(allowed), answer).await;
        answer.unwrap_err().code()
    }

    #[tokio::test]
    async fn cancelled_is_late_only_when_the_time_is_over() {
        let early = cancelled_within(Duration::from_secs(30)).await;
        assert_eq!(early, tonic::Code::Unavailable);
        let late = cancelled_within(Duration::ZERO).await;
        assert_eq!(late, tonic::Code::DeadlineExceeded);
    }
}
