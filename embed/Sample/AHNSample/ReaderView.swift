import SwiftUI

struct ReaderView: View {
  @Bindable var reader: Reader
  @State private var question = ""
  @State private var isTargeted = false
  @State private var isSaving = false

  var body: some View {
    VStack(alignment: .leading, spacing: 12) {
      gauge
      conversation
      bar
    }
    .padding()
    .background(isTargeted ? Color.accentColor.opacity(0.1) : .clear)
    .dropDestination(for: URL.self) { urls, _ in
      urls.first.map(reader.read)
      return !urls.isEmpty
    } isTargeted: {
      isTargeted = $0
    }
    .alert(
      "That did not work", isPresented: .constant(reader.problem != nil),
      actions: { Button("OK") { reader.problem = nil } },
      message: { Text(reader.problem ?? "") }
    )
    .fileExporter(
      isPresented: $isSaving, item: reader.saved, contentTypes: [.data],
      defaultFilename: "memory.ahn", onCompletion: { _ in reader.forgetSaved() }
    )
    .onChange(of: reader.saved) { isSaving = reader.saved != nil }
  }

  /// However long the text is, the second number stays where it is.
  private var gauge: some View {
    VStack(alignment: .leading) {
      HStack {
        Text(reader.status)
        Spacer()
        Text("\(reader.tokenCount) tokens in \(megabytes) MB").monospacedDigit()
      }
      ProgressView(value: reader.fraction ?? 0).opacity(reader.fraction == nil ? 0 : 1)
    }
  }

  private var megabytes: String { String(format: "%.1f", Double(reader.memoryBytes) / 1e6) }

  private var conversation: some View {
    ScrollView {
      VStack(alignment: .leading, spacing: 8) {
        ForEach(reader.exchanges) { exchange in
          Text(exchange.question).bold()
          Text(exchange.answer).textSelection(.enabled)
        }
      }
      .frame(maxWidth: .infinity, alignment: .leading)
    }
    .frame(maxHeight: .infinity)
  }

  private var bar: some View {
    HStack {
      TextField("Who is the captain?", text: $question)
        .onSubmit(ask)
        .disabled(!reader.isReady)
      if reader.isBusy {
        Button("Stop", action: reader.stop)
      } else {
        Button("Ask", action: ask).disabled(question.isEmpty || !reader.isReady)
      }
      Button("Save\u{2026}", action: reader.save).disabled(!reader.isReady)
    }
  }

  private func ask() {
    guard !question.isEmpty else { return }
    reader.ask(question)
    question = ""
  }
}
