//! Dialogues written as one text, the way HH-RLHF stores them: `"\n\nHuman: …\n\nAssistant: …"`.

use super::prompt::Message;

const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

/// The messages of a transcript, each trimmed, or `None` when `text` does not start with a turn's marker.
///
/// A turn may be empty and two turns of one speaker may follow each other: HH-RLHF has both, and what to do
/// with them is the chat template's affair.
pub fn parse_transcript(text: &str) -> Option<Vec<Message>> {
    let (mut role, mut rest) = strip_marker(text)?;
    let mut messages = Vec::new();
    loop {
        let next = TURNS.iter().filter_map(|(marker, _)| rest.find(marker)).min();
        let content = rest[..next.unwrap_or(rest.len())].trim().to_owned();
        messages.push(Message { role: role.to_owned(), content });
        match next.and_then(|at| strip_marker(&rest[at..])) {
            Some(turn) => (role, rest) = turn,
            None => return Some(messages),
        }
    }
}

fn strip_marker(text: &str) -> Option<(&'static str, &str)> {
    TURNS.iter().find_map(|(marker, role)| Some((*role, text.strip_prefix(marker)?)))
}
