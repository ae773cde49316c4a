import AHN
import CoreTransferable
import Foundation
import Observation
import UniformTypeIdentifiers

/// What the window shows, and what its buttons do.
@MainActor @Observable
final class Reader {
  struct Exchange: Identifiable {
    let id = UUID()
    let question: String
    var answer = ""
  }

  private(set) var exchanges: [Exchange] = []
  private(set) var status = "Opening the model\u{2026}"
  private(set) var fraction: Double?
  private(set) var memoryBytes = 0
  private(set) var tokenCount = 0
  private(set) var isBusy = false
  private(set) var saved: MemoryFile?
  var problem: String?

  private var model: AHNModel?
  private var session: AHNSession?
  private var task: Task<Void, Never>?

  var isReady: Bool { session != nil && !isBusy }

  /// The model lies in the app's resources.
  func open() async {
    guard model == nil else { return }
    do {
      guard let url = Bundle.main.url(forResource: "Model", withExtension: "ahnmodel") else {
        throw AHNError(kind: .noFile, message: "The app has no Model.ahnmodel among its resources.")
      }
      try AHNModel.limit(cache: 256 << 20)
      let model = try await AHNModel(contentsOf: url)
      self.model = model
      session = try model.session()
      status = "Drop a text here."
      measure()
    } catch {
      status = "No model."
      problem = error.localizedDescription
    }
  }

  func read(_ url: URL) {
    begin("Reading \(url.lastPathComponent)") { [self] session in
      let scoped = url.startAccessingSecurityScopedResource()
      defer { if scoped { url.stopAccessingSecurityScopedResource() } }
      if url.pathExtension == "ahn" {
        guard let model else { return }
        self.session = try await model.session(memory: url)
        exchanges = []
        return
      }
      let text = try String(contentsOf: url, encoding: .utf8)
      try await session.read(text, name: url.lastPathComponent) { progress in
        Task { @MainActor in
          self.fraction = progress.fraction
          self.measure()
        }
      }
    }
  }

  func ask(_ question: String) {
    exchanges.append(Exchange(question: question))
    let last = exchanges.count - 1
    begin("Answering") { [self] session in
      for try await piece in session.streamResponse(to: question) {
        exchanges[last].answer += piece
        measure()
      }
    }
  }

  /// A sandboxed app may write a file where the user wants it, but no other file beside it, which
  /// saving does first. So the memory is saved among the app's own files, and copied by the system.
  func save() {
    begin("Saving") { [self] session in
      let url = FileManager.default.temporaryDirectory
        .appendingPathComponent("\(UUID().uuidString).ahn")
      try await session.save(to: url)
      saved = MemoryFile(url: url)
    }
  }

  func forgetSaved() {
    if let saved { try? FileManager.default.removeItem(at: saved.url) }
    saved = nil
  }

  /// Keeps what was read or said so far.
  func stop() { task?.cancel() }

  private func begin(_ what: String, _ work: @escaping (AHNSession) async throws -> Void) {
    guard let session, !isBusy else { return }
    isBusy = true
    status = what
    task = Task {
      do {
        try await work(session)
        status = "Ask, or drop another text."
      } catch is CancellationError {
        status = "Stopped."
      } catch {
        status = "Ask, or drop a text."
        problem = error.localizedDescription
      }
      fraction = nil
      isBusy = false
      measure()
    }
  }

  private func measure() {
    memoryBytes = session?.memoryBytes ?? 0
    tokenCount = session?.tokenCount ?? 0
  }
}

/// A memory on its way to where the user wants it.
struct MemoryFile: Transferable, Equatable {
  let url: URL

  static var transferRepresentation: some TransferRepresentation {
    FileRepresentation(exportedContentType: .data) { SentTransferredFile($0.url) }
  }
}
