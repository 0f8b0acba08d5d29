//! What a stop waits for. An answer that has its headers is not sent yet: its body may wait for a slow reader, in hyper's
//! hands or in a connection's buffer, and is in progress until its last byte is the kernel's to deliver.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::{admission::Part, transport::Connection};

/// A body that holds something until it has ended, or its reader has gone.
pub(crate) struct Held<B, T> {
    body: B,
    _held: T,
}

impl<B, T> Held<B, T> {
    pub(crate) fn new(body: B, held: T) -> Held<B, T> {
        Held { body, _held: held }
    }
}

impl<B: Body + Unpin, T: Unpin> Body for Held<B, T> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a connection's last answer holds while bytes of it are in the connection's buffer.
#[derive(Clone, Default)]
pub(crate) struct Unsent(Arc<Mutex<Option<Sending>>>);

impl Unsent {
    fn set(&self, sending: Option<Sending>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sending;
    }
}

/// What an answer holds until it is sent: a stop that waits for it, room.
struct Sending {
    _token: TaskTrackerToken,
    _room: Option<Room>,
}

/// The room for an answer, an extension of its response.
#[derive(Clone)]
pub(crate) struct Room(#[expect(dead_code, reason = "held")] pub(crate) Arc<Part>);

/// Held by an answer over HTTP/1, and left to its connection when the body has ended.
pub(crate) struct Answering {
    sending: Option<Sending>,
    unsent: Unsent,
}

impl Answering {
    pub(crate) fn new(token: TaskTrackerToken, unsent: Unsent) -> Answering {
        let sending = Sending {
            _token: token,
            _room: None,
        };
        Answering {
            sending: Some(sending),
            unsent,
        }
    }

    /// The answer has room, which it gives back when it is sent.
    pub(crate) fn hold(&mut self, room: Option<Room>) {
        if let Some(sending) = &mut self.sending {
            sending._room = room;
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.unsent.set(self.sending.take());
    }
}

/// The socket of an HTTP/1 connection. hyper flushes it when its own buffer is empty, and only then.
pub(crate) struct Socket {
    stream: Connection,
    unsent: Unsent,
}

impl Socket {
    pub(crate) fn new(stream: Connection, unsent: Unsent) -> Socket {
        Socket { stream, unsent }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            self.unsent.set(None);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use http_body_util::Full;
    use hyper::body::Bytes;
    use tower::Service as _;

    use crate::{config::Limits, grpc::Guard, roles::Policy};

    #[tokio::test]
    async fn a_call_is_in_progress_to_the_last_byte_of_its_answer() {
        let guard = Guard::new("answering", &Limits::default(), Policy::new(&[], None));
        let mut service = guard.wrap(tower::service_fn(|_: Request<tonic::body::Body>| {
            let body = tonic::body::Body::new(Full::new(Bytes::from_static(b"answer")));
            std::future::ready(Ok::<_, Infallible>(Response::new(body)))
        }));
        let answer = service
            .call(Request::new(tonic::body::Body::new(Full::new(
                Bytes::from_static(&[0; 5]),
            ))))
            .await
            .unwrap();
        let mut idle = Box::pin(guard.idle());
        assert!(futures::poll!(&mut idle).is_pending());
        drop(answer);
        idle.await;
    }
}
