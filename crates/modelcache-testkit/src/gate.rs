//! A gate in front of a real server: requires credentials, redirects downloads, and logs requests.
//!
//! The server behind answers the requests that pass. Matching downloads are redirected to a second listener, the CDN,
//! which requires a signature and serves the same bytes. Tokens that arrive at the CDN appear in the log.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{AUTHORIZATION, HOST, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;

use crate::faults::Faults;
use crate::lie::Kind as LieKind;
use crate::log::{Log, LoggedRequest, Place};
use crate::serve::{Answer, Dropped, Server, answer, bind, lock, serve};

/// The credentials that a gate requires.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Demand {
    /// No credentials.
    #[default]
    Nothing,
    /// Exactly this `Authorization` header.
    Exactly(String),
    /// A token issued by the gate at `/token`: to every client, or only for this user and password.
    Token(Option<(String, String)>),
}

/// A running gate with its CDN. Both stop when it is dropped.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    front: Server,
    cdn: Server,
}

#[derive(Debug)]
struct Shared {
    behind: SocketAddr,
    /// Requests are forwarded unchanged, including the host and credentials that a signature may cover.
    is_transparent: bool,
    rules: Mutex<Rules>,
    lies: Faults<LieKind>,
    lie_count: AtomicU64,
    /// Bytes sent as bodies of endless answers.
    endless_bytes: Arc<AtomicU64>,
    log: Log,
}

#[derive(Debug, Default)]
struct Rules {
    demand: Demand,
    /// Address of the token endpoint in the challenge; `None` is the gate's own `/token`.
    realm: Option<String>,
    /// Requests that the next token may be used for.
    uses: usize,
    tokens: HashMap<String, usize>,
    issued: usize,
    /// Downloads with this string in their path are redirected.
    redirected: Option<String>,
    /// Requests that each signed URL of the CDN may be used for; `None` is no limit.
    spent_after: Option<usize>,
    signatures: HashMap<String, usize>,
}

impl Gate {
    /// Starts a gate in front of the server at `behind`. It requires no credentials at first.
    pub fn start(behind: SocketAddr) -> anyhow::Result<Self> {
        Self::start_in_front_of(behind, false)
    }

    /// Starts a gate that forwards every request unchanged, including the host and credentials that a signature may
    /// cover.
    pub fn transparent(behind: SocketAddr) -> anyhow::Result<Self> {
        Self::start_in_front_of(behind, true)
    }

    fn start_in_front_of(behind: SocketAddr, is_transparent: bool) -> anyhow::Result<Self> {
        let rules = Mutex::new(Rules { uses: usize::MAX, ..Rules::default() });
        let shared = Arc::new(Shared {
            behind,
            is_transparent,
            rules,
            lies: Faults::default(),
            lie_count: AtomicU64::new(0),
            endless_bytes: Arc::default(),
            log: Log::default(),
        });
        // The CDN is another host, also for clients that compare hosts without ports.
        let (front, cdn) = (bind("127.0.0.1:0")?, bind("127.0.0.2:0").or_else(|_| bind("127.0.0.1:0"))?);
        let (front_addr, cdn_addr) = (front.1, cdn.1);
        let front = serve(front, {
            let shared = shared.clone();
            move |request| at_the_front(shared.clone(), front_addr, cdn_addr, request)
        });
        let cdn = serve(cdn, {
            let shared = shared.clone();
            move |request| at_the_cdn(shared.clone(), request)
        });
        Ok(Self { shared, front, cdn })
    }

    /// Address of the gate's listener.
    pub fn addr(&self) -> SocketAddr {
        self.front.addr()
    }

    /// The gate's URL, without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The armed lies; see [`Lie`](crate::Lie) for the kinds.
    pub fn lies(&self) -> &Faults<LieKind> {
        &self.shared.lies
    }

    /// Bytes of endless answers that clients have taken.
    pub fn endless_bytes(&self) -> u64 {
        self.shared.endless_bytes.load(Ordering::SeqCst)
    }

    /// Sets the credentials required from now on.
    pub fn demand(&self, demand: Demand) {
        lock(&self.shared.rules).demand = demand;
    }

    /// Names another token endpoint in the challenge.
    pub fn realm(&self, realm: &str) {
        lock(&self.shared.rules).realm = Some(realm.to_owned());
    }

    /// Limits how many requests the next token may be used for. Later tokens have no limit: otherwise,
    /// concurrent requests could use up the new token that another request has just fetched.
    pub fn next_token_uses(&self, uses: usize) {
        lock(&self.shared.rules).uses = uses;
    }

    /// Redirects GETs with `part` in their path to the CDN.
    pub fn redirect(&self, part: &str) {
        lock(&self.shared.rules).redirected = Some(part.to_owned());
    }

    /// Limits how many requests each signed URL of the CDN may be used for.
    pub fn spent_after(&self, requests: usize) {
        lock(&self.shared.rules).spent_after = Some(requests);
    }

    /// While down, every connection is closed without an answer.
    pub fn down(&self, down: bool) {
        self.front.set_down(down);
        self.cdn.set_down(down);
    }

    /// All requests so far. The gate's own listener is logged as [`Place::Gate`].
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.log.all()
    }

    /// Clears the request log.
    pub fn clear_requests(&self) {
        self.shared.log.clear();
    }
}

async fn at_the_front(
    shared: Arc<Shared>,
    front: SocketAddr,
    cdn: SocketAddr,
    request: Request<Incoming>,
) -> Result<Answer, Dropped> {
    let mut seen = LoggedRequest::of(Place::Gate, &request);
    let decided = shared.decide(front, cdn, &request);
    let answer = match decided {
        Some(answer) => Ok(answer),
        None => forward_or_lie(&shared, request).await,
    };
    seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
    shared.log.push(seen);
    answer
}

async fn at_the_cdn(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let mut seen = LoggedRequest::of(Place::Cdn, &request);
    // The CDN accepts signatures only; a token does not help.
    let answer = match shared.signature_holds(request.uri().query().unwrap_or_default()) {
        true => forward(&shared, request).await,
        false => Ok(json_answer(StatusCode::FORBIDDEN, "spent")),
    };
    seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
    shared.log.push(seen);
    answer
}

impl Shared {
    /// Returns the gate's own answer, or `None` if the request is to be forwarded.
    fn decide(&self, front: SocketAddr, cdn: SocketAddr, request: &Request<Incoming>) -> Option<Answer> {
        let mut rules = lock(&self.rules);
        let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        // The token endpoint needs no token.
        if request.uri().path() == "/token" {
            return Some(rules.token(shown));
        }
        // Check the credentials before the redirect: only an authorized client gets a signed address.
        if !rules.satisfied(shown) {
            return Some(rules.challenge(front));
        }
        let path = request.uri().path();
        let part = rules.redirected.clone()?;
        (request.method() == hyper::Method::GET && path.contains(&part)).then(|| {
            // Every redirect gets a new signature. "canary" lets tests search logs and files for leaked secrets.
            let signature = format!("canary-signature-{}", rules.signatures.len());
            let good_for = rules.spent_after.unwrap_or(usize::MAX);
            rules.signatures.insert(signature.clone(), good_for);
            let mut answer = json_answer(StatusCode::TEMPORARY_REDIRECT, "");
            let place = format!("http://{cdn}{path}?signature={signature}");
            answer.headers_mut().insert(LOCATION, HeaderValue::from_str(&place).expect("an address"));
            answer
        })
    }

    fn signature_holds(&self, query: &str) -> bool {
        let mut rules = lock(&self.rules);
        match query.strip_prefix("signature=").and_then(|signature| rules.signatures.get_mut(signature)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

impl Rules {
    fn satisfied(&mut self, shown: &str) -> bool {
        match &self.demand {
            Demand::Nothing => true,
            Demand::Exactly(wanted) => shown == wanted,
            Demand::Token(_) => match shown.strip_prefix("Bearer ").and_then(|token| self.tokens.get_mut(token)) {
                Some(left) if *left > 0 => {
                    *left -= 1;
                    true
                }
                _ => false,
            },
        }
    }

    fn challenge(&self, front: SocketAddr) -> Answer {
        let mut answer =
            json_answer(StatusCode::UNAUTHORIZED, "{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"who?\"}]}");
        let realm = self.realm.clone().unwrap_or_else(|| format!("http://{front}/token"));
        let challenge = match &self.demand {
            Demand::Token(_) => {
                format!("Bearer realm=\"{realm}\",service=\"testkit\",scope=\"repository:x:pull,push\"")
            }
            _ => "Basic realm=\"testkit\"".to_owned(),
        };
        answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_str(&challenge).expect("a challenge"));
        answer
    }

    fn token(&mut self, shown: &str) -> Answer {
        let Demand::Token(login) = &self.demand else { return json_answer(StatusCode::NOT_FOUND, "no tokens here") };
        let wanted = login.as_ref().map(|(user, password)| {
            let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            format!("Basic {pair}")
        });
        if wanted.is_some_and(|wanted| wanted != shown) {
            return json_answer(StatusCode::UNAUTHORIZED, "{\"details\":\"wrong\"}");
        }
        self.issued += 1;
        let token = format!("canary-token-{}", self.issued);
        self.tokens.insert(token.clone(), std::mem::replace(&mut self.uses, usize::MAX));
        answer(StatusCode::OK, "application/json", format!("{{\"token\":\"{token}\",\"expires_in\":300}}"))
    }
}

fn json_answer(status: StatusCode, body: &'static str) -> Answer {
    answer(status, "application/json", body)
}

/// Forwards the request, unless a lie replaces the answer; a lie may also corrupt the answer of the server behind.
async fn forward_or_lie(shared: &Shared, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let path = percent_decode_str(request.uri().path()).decode_utf8_lossy().into_owned();
    let subject = format!("{path}?{}", request.uri().query().unwrap_or_default());
    let method = request.method().to_string();
    let number = shared.lie_count.fetch_add(1, Ordering::SeqCst);
    if let Some(lie) = shared.lies.take(&method, &subject, |lie| !lie.corrupts_answer()) {
        return lie.answer(number, &shared.endless_bytes).ok_or(Dropped);
    }
    // Lies that replace the answer are taken first, so that the server behind does not get the request.
    let answer = forward(shared, request).await?;
    // A body of at most one byte answers a probe for the first byte; do not use up a lie on it.
    if !answer.status().is_success()
        || method != "GET"
        || answer.body().size_hint().exact().is_some_and(|size| size < 2)
    {
        return Ok(answer);
    }
    match shared.lies.take(&method, &subject, LieKind::corrupts_answer) {
        Some(lie) => lie.corrupt(answer).await,
        None => Ok(answer),
    }
}

/// Returns the answer of the server behind. Credentials are removed and the host is replaced, unless the gate is
/// transparent.
async fn forward(shared: &Shared, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let (behind, (mut head, body)) = (shared.behind, request.into_parts());
    if !shared.is_transparent {
        head.headers.remove(AUTHORIZATION);
        head.headers.insert(HOST, HeaderValue::from_str(&behind.to_string()).map_err(|_| Dropped)?);
    }
    let body: Bytes = body.collect().await.map_err(|_| Dropped)?.to_bytes();
    let stream = TcpStream::connect(behind).await.map_err(|_| Dropped)?;
    // One connection to the server behind per request.
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|_| Dropped)?;
    tokio::spawn(async move { drop(connection.await) });
    let response = sender.send_request(Request::from_parts(head, Full::new(body))).await.map_err(|_| Dropped)?;
    let (head, body) = response.into_parts();
    Ok(Response::from_parts(head, body.map_err(Into::into).boxed_unsync()))
}
