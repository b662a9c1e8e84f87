//! Writes tables as TOML text.

use crate::Table;

/// Collects TOML: sections in order, each with its `key = value` lines.
#[derive(Default)]
pub struct Writer {
    sections: Vec<Section>,
}

struct Section {
    path: String,
    header: String,
    lines: Vec<String>,
}

impl Writer {
    /// Starts the root section, number 0.
    pub fn new() -> Self {
        Self { sections: vec![Section { path: String::new(), header: String::new(), lines: Vec::new() }] }
    }

    /// Adds `name = value` to a section.
    pub fn line(&mut self, section: usize, name: &str, value: &str) {
        self.sections[section].lines.push(format!("{name} = {value}"));
    }

    /// Opens `[parent.name]`, or `[[parent.name]]` when `repeated`, and gives its number.
    pub fn open(&mut self, parent: usize, name: &str, repeated: bool) -> usize {
        let parent = &self.sections[parent].path;
        let path = if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") };
        let header = if repeated { format!("[[{path}]]") } else { format!("[{path}]") };
        self.sections.push(Section { path, header, lines: Vec::new() });
        self.sections.len() - 1
    }

    /// The text; sections without a line are left out.
    pub fn finish(self) -> String {
        let written = self.sections.into_iter().filter(|section| !section.lines.is_empty());
        let blocks = written.map(|section| {
            let header = if section.header.is_empty() { String::new() } else { section.header + "\n" };
            header + &section.lines.join("\n") + "\n"
        });
        blocks.collect::<Vec<_>>().join("\n")
    }
}

/// A whole table as TOML that loads again to the same value.
pub fn to_toml<T: Table>(table: &T) -> String {
    let mut writer = Writer::new();
    table.write(0, &mut writer);
    writer.finish()
}
