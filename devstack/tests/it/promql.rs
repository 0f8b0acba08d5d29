//! As much of PromQL as tests must read: which series a query asks for. What a query means is for Prometheus to say.

/// `name{label="value"}[range]` in a query.
#[derive(Debug)]
pub(crate) struct Selector {
    /// `NAME` of `{__name__=~"(checkout|loms|notifications)_NAME"}` for each service.
    pub(crate) names: Vec<String>,
    pub(crate) labels: Vec<String>,
    pub(crate) ranged: bool,
}

const SERVICES: &str = "(checkout|loms|notifications)_";
const PREFIXES: [&str; 4] = ["checkout_", "loms_", "notifications_", "process_"];

/// The selectors of a query, in their order.
pub(crate) fn selectors(query: &str) -> Vec<Selector> {
    let mut found = Vec::new();
    let mut rest = query;
    while let Some(start) = rest.find(|c: char| c.is_alphabetic() || "{\"".contains(c)) {
        rest = &rest[start..];
        if let Some(text) = rest.strip_prefix('"') {
            rest = &text[text.find('"').expect("an end of the text") + 1..];
            continue;
        }
        let word = |c: char| c == '_' || c.is_alphanumeric();
        let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        rest = after;
        let mut matchers = Vec::new();
        if after.starts_with('{') {
            let end = after.find('}').expect("an end of the labels");
            matchers = split_matchers(&after[1..end]);
            rest = &after[end + 1..];
        } else if name != "up" && !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let names = match matchers.iter().find(|(label, _)| label == "__name__") {
            Some((_, value)) => {
                let name = value
                    .strip_prefix(SERVICES)
                    .expect("a name of each service");
                ["checkout", "loms", "notifications"]
                    .map(|service| format!("{service}_{name}"))
                    .into()
            }
            None => vec![name.to_owned()],
        };
        let labels = matchers.into_iter().map(|(label, _)| label);
        found.push(Selector {
            names,
            labels: labels.filter(|label| label != "__name__").collect(),
            ranged: rest.starts_with('['),
        });
    }
    found
}

/// `label="value", label=~"value"` as pairs.
fn split_matchers(text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while let Some((label, after)) = rest.split_once('"') {
        let (value, after) = after.split_once('"').expect("an end of the value");
        let label = label.trim_matches(|c: char| ", =~!".contains(c));
        pairs.push((label.to_owned(), value.to_owned()));
        rest = after;
    }
    pairs
}

#[test]
fn selectors_are_found() {
    let query = "60 * sum by (job, le) (rate({__name__=~\"(checkout|loms|notifications)_x_bucket\", job=~\"$service\"}[1m])) \
        / max(up{job!=\"a, b\"}) or loms_y offset 10m or vector(0)";
    let found = selectors(query);
    let names: Vec<_> = found
        .iter()
        .map(|selector| selector.names.join(" "))
        .collect();
    let expected = [
        "checkout_x_bucket loms_x_bucket notifications_x_bucket",
        "up",
        "loms_y",
    ];
    assert_eq!(names, expected);
    let labels: Vec<_> = found
        .iter()
        .map(|selector| selector.labels.join(" "))
        .collect();
    assert_eq!(labels, ["job", "job", ""]);
    let ranged: Vec<_> = found.iter().map(|selector| selector.ranged).collect();
    assert_eq!(ranged, [true, false, false]);
}
