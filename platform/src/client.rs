//! Calls to neighbours: one channel each, built once, connected when needed, with TLS, a deadline per call that never
//! passes the caller's own, the trace context, and a counter by method and code.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response, Uri};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use prometheus::{CounterVec, Opts};
use tokio::{net::TcpStream, time::Instant};
use tonic::{
    Status,
    body::Body,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tower::{BoxError, Service};
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    error::{Code, Fault, StartError, go_name},
    grpc::{Deadline, code_of, record_code, registered, timeout_of},
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
    /// The CA that its certificate is verified with; none means plaintext.
    pub tls_ca: Option<PathBuf>,
    /// The certificate and key that are shown to a neighbour that asks for one.
    pub tls_identity: Option<(PathBuf, PathBuf)>,
    pub connect_timeout: Duration,
    /// The longest that one call may take.
    pub timeout: Duration,
}

/// A channel to a [`Neighbour`] for the generated clients; clones share the connection.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    timeout: Duration,
    name: &'static str,
    calls: CounterVec,
}

impl Client {
    /// # Errors
    /// An address that is none, or a CA file that cannot be read.
    pub fn new(service: &'static str, neighbour: &Neighbour) -> Result<Client, StartError> {
        let scheme = if neighbour.tls_ca.is_some() {
            "https"
        } else {
            "http"
        };
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
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", neighbour.address))
            .map_err(|error| wrong(error.to_string()))?
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_timeout(Duration::from_secs(5));
        if let Some(ca) = &neighbour.tls_ca {
            let pem = fs::read(ca).map_err(|error| {
                StartError::new(
                    format!("reading the CA {}: {error}", ca.display()),
                    "run make certs, or set tls.ca",
                )
            })?;
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            if let Some((cert, key)) = &neighbour.tls_identity {
                let read = |path: &PathBuf| {
                    fs::read(path).map_err(|error| {
                        StartError::new(
                            format!("reading {}: {error}", path.display()),
                            "run make certs, or set tls.cert and tls.key",
                        )
                    })
                };
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(|error| {
                StartError::new(
                    format!("the CA {}: {error}", ca.display()),
                    "run make certs, or set tls.ca",
                )
            })?;
        }
        Ok(Client {
            channel: endpoint.connect_with_connector_lazy(Connect::new(neighbour.connect_timeout)),
            timeout: neighbour.timeout,
            name: neighbour.name,
            calls: outbound_calls(service),
        })
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
        let fault = |code: Code, what: &str| {
            Status::from(Fault::new(code, format!("{} {what}", self.name)))
        };
        let late = || fault(Code::DeadlineExceeded, "did not answer in time");
        match tokio::time::timeout(allowed, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            // a server (tonic's among them) answers an expired grpc-timeout with CANCELLED; hyper says the same of a
            // request that a connection about to close did not take
            Ok(Err(status)) if status.code() == tonic::Code::Cancelled => {
                let is_late = began.elapsed() + TIMER_SLACK >= allowed;
                Err(if is_late {
                    late()
                } else {
                    fault(Code::Unavailable, "broke off the call")
                })
            }
            Ok(Err(status)) => Err(status),
            Err(_) => Err(late()),
        }
    }
}

/// Connects, and remembers a host that does not answer. A channel connects for one waiting call at a time: a hundred
/// callers of a host that is gone would wait for a hundred time-outs, one after the other.
struct Connect {
    tcp: HttpConnector,
    timeout: Duration,
    silent_until: Arc<Mutex<Instant>>,
}

impl Connect {
    fn new(timeout: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(timeout));
        tcp.set_keepalive(Some(Duration::from_secs(15)));
        tcp.set_nodelay(true);
        Connect {
            tcp,
            timeout,
            silent_until: Arc::new(Mutex::new(Instant::now())),
        }
    }
}

impl Service<Uri> for Connect {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<TokioIo<TcpStream>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(BoxError::from)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (began, timeout) = (Instant::now(), self.timeout);
        if began < *locked(&self.silent_until) {
            let known = BoxError::from("the last attempt to connect had no answer");
            return Box::pin(std::future::ready(Err(known)));
        }
        let (connecting, silent_until) = (self.tcp.call(uri), self.silent_until.clone());
        Box::pin(async move {
            let connected = connecting.await;
            if connected.is_err() {
                // for as long again as it took: a refusal took no time, who restarts is asked again at once. Counted from
                // the beginning, because nobody may have looked at the attempt since
                let took = began.elapsed().min(timeout);
                *locked(&silent_until) = began + 2 * took;
            }
            connected.map_err(BoxError::from)
        })
    }
}

fn locked(instant: &Mutex<Instant>) -> MutexGuard<'_, Instant> {
    instant.lock().unwrap_or_else(PoisonError::into_inner)
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
        let answer = self.channel.call(request);
        let counted = async move {
            let answer = answer.await;
            outcome.end(match &answer {
                Ok(response) => code_of(response.headers()),
                Err(_) => tonic::Code::Unavailable,
            });
            answer
        };
        Box::pin(counted.instrument(span))
    }
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
            tls_ca: None,
            tls_identity: None,
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(60),
        };
        let client = Client::new("cancelling", &neighbour).unwrap();
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
